"""Catches: a `clip_score` that is not transformers' own cosine, that depends on the batch, or that survives other weights."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from capfilt.plugins.clip import ClipScorer
from tests.refusals import names, refused

transformers = pytest.importorskip("transformers")

WORDS = ("a", "red", "green", "blue", "square", "of", "picture", "number")
TEXTS = ["a red square", "Blue  square of a picture", "green", "a " * 40, "number 7 unknown"]


def save_clip(directory, seed: int = 0):
    """A tiny random CLIP with a tokenizer of whole words, as `save_pretrained` writes one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ("<|startoftext|>", "<|endoftext|>", "<|unknown|>")
    vocabulary = {word: place for place, word in enumerate((*special, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=special[2]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], 0), (special[1], 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=special[0], eos_token=special[1], pad_token=special[1], unk_token=special[2]
    )  # fmt: skip
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        # As initialised every text is nearly the same point; this tells them apart.
        for name, parameter in model.named_parameters():
            if "embedding" in name or "projection" in name or name.endswith("proj.weight"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    pictures = {
        "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_convert_rgb": True,
        "image_processor_type": "CLIPImageProcessor",
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(pictures))
    return directory


def picture(width: int, height: int, seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(40, 57, 1), picture(64, 33, 2), picture(32, 32, 3), picture(17, 90, 4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(directory):
    made = ClipScorer(str(directory))
    made.setup()
    return made


def scored(scorer, batch_size=64):
    index = [0, 1, 2, 3, 1, 0]
    images = [scorer.prepare(data) for data in PICTURES]
    texts = [*TEXTS, TEXTS[0]]
    return scorer.score(images, index, texts, batch_size=batch_size, max_text_tokens=3)[:, 0], index, texts


def test_the_score_is_transformers_own_cosine(directory, scorer):
    scores, index, texts = scored(scorer)
    model = transformers.CLIPModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = processor.from_pretrained(directory)
    pixels = processor([Image.open(io.BytesIO(PICTURES[i])) for i in index], return_tensors="pt")
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        out = model(**tokens, pixel_values=pixels["pixel_values"])
    wanted = (out.image_embeds * out.text_embeds).sum(-1)
    assert scores.dtype == np.float32
    assert np.abs(scores - wanted.numpy()).max() < 1e-5
    assert scores.std() > 0.02  # else the comparison would say nothing
    assert np.abs(scores).max() <= 1


def test_the_score_does_not_depend_on_the_batch(scorer):
    assert np.allclose(scored(scorer)[0], scored(scorer, batch_size=1)[0], atol=1e-6)


def test_texts_are_cleaned_as_the_released_code_does_before_its_tokenizer(scorer):
    # Catches: entities and white space that reach the model, which was trained without them.
    image = [scorer.prepare(PICTURES[0])]
    said = ["a red&amp;nbsp;&#32;square", "a&nbsp;red\n square ", "A RED SQUARE"]
    scores = scorer.score(image, [0] * 3, said, batch_size=8)[:, 0]
    assert np.allclose(scores, scorer.score(image, [0], ["a red square"], batch_size=8)[0, 0], atol=1e-6)


def test_a_large_jpeg_is_scaled_by_its_decoder_only_where_told(directory, scorer):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(400, 300, 5))).save(buffer, "JPEG")
    whole = (
        Image.open(io.BytesIO(buffer.getvalue()))
        .resize((42, 32), Image.Resampling.BICUBIC)
        .crop((5, 0, 37, 32))
    )
    assert np.array_equal(scorer.prepare(buffer.getvalue()).transpose(1, 2, 0), np.asarray(whole))
    quick = ClipScorer(str(directory), draft="yes")
    assert (
        0
        < np.abs(quick.prepare(buffer.getvalue()).astype(int) - scorer.prepare(buffer.getvalue())).max()
        < 40
    )
    with refused("draft no"):
        ClipScorer(str(directory), draft="no")


def test_bf16_is_an_option_and_near_fp32(directory, scorer):
    low = ClipScorer(str(directory), precision="bf16")
    low.setup()
    apart = np.abs(scored(low)[0] - scored(scorer)[0]).max()
    assert 0 < apart < 0.03


def test_the_fingerprint_is_of_weights_words_and_pictures(tmp_path):
    first = save_clip(tmp_path / "a")
    mark = ClipScorer(str(first)).fingerprint()
    assert ClipScorer(str(save_clip(tmp_path / "b"))).fingerprint() == mark
    assert ClipScorer(str(save_clip(tmp_path / "c", seed=1))).fingerprint() != mark
    for name in ("preprocessor_config.json", "tokenizer.json"):
        whole = (first / name).read_text()
        (first / name).write_text(whole + " ")
        assert ClipScorer(str(first)).fingerprint() != mark, name
        (first / name).write_text(whole)
    (first / "README.md").write_text("about")
    assert ClipScorer(str(first)).fingerprint() == mark


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model_type": "blip"}, "model_type blip clip"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "preprocessing"),
        ("preprocessor_config.json", {"crop_size": 30}, "size 32 crop_size 30"),
        ("preprocessor_config.json", {"resample": 2}, "resample 2"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std"),
        ("preprocessor_config.json", {"size": 24, "crop_size": 24}, "24 pixels 32"),
    ],
)  # fmt: skip
def test_a_directory_that_is_no_clip_is_one_line(directory, tmp_path, name, change, message):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(json.dumps({**json.loads((tmp_path / name).read_text()), **change}))
    with refused(message):
        ClipScorer(str(tmp_path)).setup()


def test_missing_files_and_options_out_of_range_are_one_line(directory, tmp_path):
    with refused("config.json"):
        ClipScorer(str(tmp_path))
    with refused("precision fp8"):
        ClipScorer(str(directory), precision="fp8")
    for path in directory.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with refused(tmp_path, "CLIP"):
        ClipScorer(str(tmp_path)).setup()


def test_without_transformers_the_error_names_the_extra(directory):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from capfilt.plugins.clip import ClipScorer\n"
        f"scorer = ClipScorer({str(directory)!r}); scorer.fingerprint()\n"
        "try: scorer.setup()\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert names(done.stdout, "UserError CLIP:", "transformers capfilt[hf]"), done.stderr
