"""Catches a ViLT that is another model on the other side of transformers' layout, a tensor that is lost on the way, and a
file that is taken for what it is not.

transformers draws a picture's patches at random even where it keeps all of them, so their states come in an order of their
own, and it fills short pictures up with drawn patches that its mask then hides; here nothing is drawn where all are kept. So
what is compared is what reads patches, not patches. The bodies run in double precision: in single, random weights make
rounding of 1e-7 into 1e-4, in transformers alone too.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models import build, checkpoint
from capfilt.models.export import export
from capfilt.models.vilt.model import Vilt
from capfilt.models.vilt.tasks import ViltClassifier, ViltClassifierConfig
from tests.models.test_vilt import CONFIG, pictures, texts, widened
from tests.refusals import refused

transformers = pytest.importorskip("transformers")

CLASSES = ["ViltModel", "ViltForMaskedLM", "ViltForImageAndTextRetrieval", "ViltForQuestionAnswering",
           "ViltForImagesAndTextClassification"]  # fmt: skip
WORDS = [f"w{number}" for number in range(35)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def theirs(name, **options):
    """transformers' model of this class, of the geometry of CONFIG, with weights of trained ones' size."""
    config = transformers.ViltConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=12, image_size=24, patch_size=8, pad_token_id=0, **options,
    )  # fmt: skip
    if name == "ViltForQuestionAnswering":
        config.num_labels = 5
    if name == "ViltForImagesAndTextClassification":
        config.num_images, config.modality_type_vocab_size, config.num_labels = 2, 3, 2
    return widened(getattr(transformers, name)(config))


def saved(tmp_path, model):
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path / "theirs"


@torch.no_grad()
def outputs_of_theirs(model, *, sized):
    ids, mask = texts()
    pixels, there = pictures()
    if type(model).__name__ == "ViltForImagesAndTextClassification":
        more, more_there = pictures(2)
        pixels, there = torch.stack([pixels, more], 1), torch.stack([there, more_there], 1)
    if not sized:
        pixels, there = pixels[..., :24, :24], torch.ones_like(there[..., :24, :24])
    found = model.double()(
        input_ids=ids, attention_mask=mask.long(), pixel_values=pixels.double(), pixel_mask=there.long()
    )
    return (found.pooler_output if type(model).__name__ == "ViltModel" else found.logits).float()


@torch.no_grad()
def outputs_of_ours(model, name, *, sized):
    ids, mask = texts()
    pixels, there = pictures()
    pixels, model = pixels.double(), copy.deepcopy(model).double()
    if isinstance(model, ViltClassifier):
        pixels, there = pixels[:, None], there[:, None]
        if model.pictures == 2:
            more, more_there = pictures(2)
            pixels, there = (
                torch.cat([pixels, more[:, None].double()], 1),
                torch.cat([there, more_there[:, None]], 1),
            )
        return (
            model.judge(ids, mask, pixels, there) if sized else model.judge(ids, mask, pixels[..., :24, :24])
        )
    image = model.encode_image(pixels, there) if sized else model.encode_image(pixels[..., :24, :24])
    states = model.fuse(ids, mask, image)
    if name == "ViltModel":
        return model.pool(states).float()
    if name == "ViltForImageAndTextRetrieval":
        return model.match_logits(states)[:, 1:]
    return model.word_logits(states.text)[..., :-2]


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_their_model_says_the_same_here_and_after_going_back(tmp_path, name, sized):
    model = theirs(name)
    directory = saved(tmp_path, model)
    contents, meta = checkpoint.open_any(directory)
    assert meta["model_type"] == ("vilt_classifier" if isinstance(contents.model, ViltClassifier) else "vilt")
    expected = outputs_of_theirs(model, sized=sized)
    found = outputs_of_ours(contents.model, name, sized=sized)
    mask = texts()[1]
    # What a model says of padding is nobody's business.
    rows = mask if name == "ViltForMaskedLM" else slice(None)
    torch.testing.assert_close(found[rows], expected[rows], atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    export(directory, "transformers", tmp_path / "back")
    again = getattr(transformers, name).from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(
        outputs_of_theirs(again, sized=sized)[rows], expected[rows], atol=1e-5, rtol=1e-5
    )


def test_a_pretrained_vilt_opens_as_both_of_their_classes_and_comes_back_whole(tmp_path):
    model = widened(build(CONFIG))
    checkpoint.save(
        tmp_path / "ours", model, Tokenizer([*VOCABULARY, "[DEC]", "[ENC]"]), {"stage": "retrain"}
    )
    lines = export(tmp_path / "ours", "transformers", tmp_path / "theirs")
    assert "vilt, layout transformers" in lines[0]
    for name in CLASSES[1:3]:
        other = getattr(transformers, name).from_pretrained(tmp_path / "theirs").eval()
        mask = texts()[1] if name == "ViltForMaskedLM" else slice(None)
        torch.testing.assert_close(
            outputs_of_theirs(other, sized=True)[mask],
            outputs_of_ours(model, name, sized=True)[mask],
            atol=1e-5,
            rtol=1e-5,
        )
    contents, meta = checkpoint.open_any(tmp_path / "theirs")
    assert meta["extra"] == {"stage": "retrain"}
    assert contents.model.config == model.config
    for key, tensor in model.state_dict().items():
        # All but the rows of [DEC] and [ENC], which have no home there and no reader here.
        rows = slice(0, -2) if tensor.shape[:1] == (CONFIG.vocab_size,) else slice(None)
        torch.testing.assert_close(contents.model.state_dict()[key][rows], tensor[rows], atol=0, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer("w3 w7")["input_ids"] == contents.tokenizer.encode(["w3 w7"], 12)[0][0].tolist()


def test_it_has_no_home_in_the_original_repositorys_layout_and_no_halves(tmp_path):
    checkpoint.save(tmp_path / "ours", build(CONFIG), Tokenizer([*VOCABULARY, "[DEC]", "[ENC]"]))
    with pytest.raises(UserError, match=r"\(Vilt\) has no home"):
        export(tmp_path / "ours", "original", tmp_path / "out")
    with refused("matches", "captioner"):
        export(tmp_path / "ours", "transformers", tmp_path / "out", only="captioner")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_classifier_keeps_its_task_and_classes(tmp_path, pictures):
    shape = {name: getattr(CONFIG, name) for name in ("vision", "text", "width", "depth", "heads", "hidden")}
    config = ViltClassifierConfig(
        **shape, task="entailment", classes=("contradiction", "neutral", "entailment"), pictures=pictures,
        max_text_tokens=9,
    )  # fmt: skip
    model = widened(build(config))
    checkpoint.save(tmp_path / "ours", model, Tokenizer([*VOCABULARY, "[DEC]", "[ENC]"]))
    export(tmp_path / "ours", "transformers", tmp_path / "theirs")
    name = CLASSES[2 + pictures]
    other = getattr(transformers, name).from_pretrained(tmp_path / "theirs").eval()
    assert other.config.id2label == {0: "contradiction", 1: "neutral", 2: "entailment"}
    torch.testing.assert_close(
        outputs_of_theirs(other, sized=False),
        outputs_of_ours(model, name, sized=False),
        atol=1e-5,
        rtol=1e-5,
    )
    assert checkpoint.open_any(tmp_path / "theirs")[0].model.config == config


def test_their_text_types_become_positions_and_older_names_are_read(tmp_path):
    model = theirs("ViltForMaskedLM")
    directory = saved(tmp_path, model)
    state = load_file(directory / "model.safetensors")
    state["mlm_score.bias"] = state["mlm_score.decoder.bias"].clone()
    state["vilt.embeddings.text_embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    found = checkpoint.open_any(directory)[0].model
    assert isinstance(found, Vilt)
    types = model.vilt.embeddings.text_embeddings.token_type_embeddings.weight[0]
    places = model.vilt.embeddings.text_embeddings.position_embeddings.weight
    torch.testing.assert_close(found.text_embeddings.position_embeddings.weight, places + types)
    assert found.word_logits(torch.zeros(1, 32))[0, -2:].max() < -50


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"qkv_bias": False}, {}, "qkv_bias False"),
        ({"layer_norm_eps": 1e-3}, {}, "layer_norm_eps"),
        ({"modality_type_vocab_size": 3}, {}, "modality_type_vocab_size 3 1"),
        ({"architectures": ["ViltForTokenClassification"]}, {}, "ViltForTokenClassification ViltModel"),
        ({}, {"vilt.extra": torch.zeros(1)}, "ViLT vilt.extra"),
        ({}, {"vilt.pooler.dense.bias": None}, "missing vilt.pooler.dense.bias"),
        ({}, {"itm_score.fc.weight": torch.zeros(2, 32)}, "match"),
        ({}, {"vilt.embeddings.text_embeddings.position_ids": torch.ones(1, 12).long()}, "position_ids"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, tensors, message):
    directory = saved(tmp_path, theirs("ViltForImageAndTextRetrieval"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    state = {**load_file(directory / "model.safetensors"), **tensors}
    state = {name: each for name, each in state.items() if each is not None}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with refused(message):
        checkpoint.open_any(directory)
