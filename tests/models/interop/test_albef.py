"""Catches an ALBEF of its original repository that is taken for a BLIP, loses a tensor without a word, forgets its token
types, or says something else than the published pass over the file's own tensors; and a BERT that starts the wrong layers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.models import build, checkpoint
from capfilt.models.albef.model import Albef, AlbefConfig, start_text
from capfilt.models.albef.tasks import (
    ASSIGNED,
    AlbefClassifier,
    AlbefNlvr,
    AlbefVqa,
    classifier_from_albef,
    nlvr_from_albef,
    vqa_from_albef,
)
from capfilt.models.common.layouts import vocabulary
from capfilt.models.common.pretrained import load_vit
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig, resize_position_embedding
from capfilt.models.export import export
from tests.models import albef_reference as plain
from tests.models.interop.reference import DEC, WORDS, loud, write_vocabulary
from tests.refusals import refused

WORDS_KNOWN, WIDTH, HIDDEN, DEPTH, EMBED = DEC, 16, 40, 4, 12
VISION_WIDTH, PATCH, GRID = 24, 8, 3
SETTINGS = {"vision.heads": 3, "text.heads": 2}


def shapes() -> dict[str, tuple[int, ...]]:
    """What the released code's pretraining class saves, written down from it."""
    made: dict[str, tuple[int, ...]] = {}

    def linear(name, into, out):
        made[f"{name}.weight"], made[f"{name}.bias"] = (out, into), (out,)

    def norm(name, width):
        made[f"{name}.weight"] = made[f"{name}.bias"] = (width,)

    v = VISION_WIDTH
    made["visual_encoder.cls_token"], made["visual_encoder.pos_embed"] = (1, 1, v), (1, GRID**2 + 1, v)
    made["visual_encoder.patch_embed.proj.weight"] = (v, 3, PATCH, PATCH)
    made["visual_encoder.patch_embed.proj.bias"] = (v,)
    for index in range(2):
        block = f"visual_encoder.blocks.{index}"
        norm(f"{block}.norm1", v)
        linear(f"{block}.attn.qkv", v, 3 * v)
        linear(f"{block}.attn.proj", v, v)
        norm(f"{block}.norm2", v)
        linear(f"{block}.mlp.fc1", v, 48)
        linear(f"{block}.mlp.fc2", 48, v)
    norm("visual_encoder.norm", v)
    bert = "text_encoder.bert"
    for name, rows in (("word", WORDS_KNOWN), ("position", 20), ("token_type", 2)):
        made[f"{bert}.embeddings.{name}_embeddings.weight"] = (rows, WIDTH)
    norm(f"{bert}.embeddings.LayerNorm", WIDTH)
    for index in range(DEPTH):
        layer = f"{bert}.encoder.layer.{index}"
        for part, source in [("attention", WIDTH)] + ([("crossattention", v)] if index >= DEPTH // 2 else []):
            linear(f"{layer}.{part}.self.query", WIDTH, WIDTH)
            linear(f"{layer}.{part}.self.key", source, WIDTH)
            linear(f"{layer}.{part}.self.value", source, WIDTH)
            linear(f"{layer}.{part}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}.{part}.output.LayerNorm", WIDTH)
        linear(f"{layer}.intermediate.dense", WIDTH, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, WIDTH)
        norm(f"{layer}.output.LayerNorm", WIDTH)
    head = "text_encoder.cls.predictions"
    linear(f"{head}.transform.dense", WIDTH, WIDTH)
    norm(f"{head}.transform.LayerNorm", WIDTH)
    made[f"{head}.bias"] = (WORDS_KNOWN,)
    linear("vision_proj", v, EMBED)
    linear("text_proj", WIDTH, EMBED)
    linear("itm_head", WIDTH, 2)
    return made


@pytest.fixture
def state():
    """A file's tensors: the model, its momentum towers, the queue."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes().items()}
    head = "text_encoder.cls.predictions"
    made[f"{head}.decoder.weight"] = made["text_encoder.bert.embeddings.word_embeddings.weight"]
    made[f"{head}.decoder.bias"] = made[f"{head}.bias"]
    made["text_encoder.bert.embeddings.position_ids"] = torch.arange(20)[None]
    for name in list(made):
        tower = name.partition(".")[0]
        if tower != "itm_head":
            made[name.replace(tower, f"{tower}_m", 1)] = made[name] + 1
    return made | {
        "temp": torch.tensor(0.03), "image_queue": torch.randn(EMBED, 8), "text_queue": torch.randn(EMBED, 8),
        "queue_ptr": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip


@pytest.fixture
def path(tmp_path, state):
    return write(tmp_path / "albef", state)


@pytest.fixture
def small_bert(monkeypatch):
    """The vocabulary of these files, taken for BERT's."""
    tokenizer = Tokenizer([*SPECIALS, *WORDS, *ADDED])
    monkeypatch.setattr(vocabulary, "BERT_SIZE", tokenizer.vocab_size - len(ADDED))
    ids = {name: getattr(tokenizer, name) for name in vocabulary.BERT_IDS}
    monkeypatch.setattr(vocabulary, "BERT_IDS", ids)
    return tokenizer


def write(directory, state):
    write_vocabulary(directory)
    (directory / "capfilt.json").write_text(json.dumps({"settings": SETTINGS, "extra": {}}))
    file = directory / "ALBEF.pth"
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "lr_scheduler": {}, "config": {}, "epoch": 29}, file
    )
    return file


def seen_and_said():
    """Pixels, and one text's ids as the original tokenizer gives them: without an end."""
    pixels = torch.randn(3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(1))
    return pixels, torch.tensor([2, 7, 9, 11, 20])


@torch.no_grad()
def test_a_file_says_what_the_published_pass_over_its_tensors_says(path, state):
    contents, meta = checkpoint.open_any(path)
    model = contents.model
    assert isinstance(model, Albef)
    assert (meta["model_type"], meta["layout"]) == ("albef", "original")
    assert checkpoint.read_config(path)["config"] == model.config.to_dict()
    pixels, ids = seen_and_said()
    seen = plain.picture(state, pixels, 3)
    alone = plain.read(state, "text_encoder.bert.", ids, DEPTH, 2, 2)
    fused = plain.read(state, "text_encoder.bert.", ids, DEPTH, 2, 2, [seen])
    image = torch.nn.functional.normalize(plain.linear(state, "vision_proj", seen[0]), dim=0)
    text = torch.nn.functional.normalize(plain.linear(state, "text_proj", alone[0]), dim=0)
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    tokens = model.encode_image(pixels[None])
    for found, expected in (
        (model.embed_image(tokens)[0], image),
        (model.embed_text(ids[None])[0], text),
        (model.match_logits(ids[None], None, tokens)[0], plain.linear(state, "itm_head", fused[0])),
        (
            model.mlm_logits(ids[None], None, model.prefill_cross(tokens))[0],
            plain.named(state, "text_encoder.cls.predictions.", words, fused),
        ),
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.temperature.item() == pytest.approx(0.03)
    assert contents.tokenizer.vocab_size == model.config.vocab_size == WORDS_KNOWN + len(ADDED)


def test_every_tensor_is_the_models_or_kept_for_a_reason(path, state):
    contents, _ = checkpoint.open_any(path)
    kept = set(contents.leftovers)
    assert kept == {
        name
        for name in state
        if name.partition(".")[0].endswith("_m") or name.endswith("_queue") or name == "queue_ptr"
    }
    state["text_encoder.bert.pooler.dense.weight"] = torch.zeros(WIDTH, WIDTH)
    with refused("1 tensors", "text_encoder.bert.pooler.dense.weight"):
        checkpoint.open_any(write(path.parent, state))
    del state["text_encoder.bert.pooler.dense.weight"]
    del state["text_encoder.bert.encoder.layer.3.crossattention.self.key.bias"]
    with refused("missing", "layer.3.crossattention.self.key.bias"):
        checkpoint.open_any(write(path.parent, state))


def test_a_head_that_is_not_tied_is_refused(path, state):
    state["text_encoder.cls.predictions.decoder.weight"] = torch.zeros(WORDS_KNOWN, WIDTH)
    with refused("tied"):
        checkpoint.open_any(write(path.parent, state))


def finetuned(kind: str) -> dict[str, torch.Tensor]:
    """A file's tensors as the released code's class of a task saves them, momentum towers included."""
    made = {
        name.replace("text_encoder.bert.", "text_encoder."): shape
        for name, shape in shapes().items()
        if not name.startswith("text_encoder.cls.")
    }
    layers = [name for name in made if name.startswith(f"text_encoder.encoder.layer.{DEPTH - 1}.")]

    def copied(index, prefix="text_encoder.", source=VISION_WIDTH):
        for name in layers:
            shape = made[name]
            if name.endswith(("crossattention.self.key.weight", "crossattention.self.value.weight")):
                shape = (WIDTH, source)
            yield (
                name.replace(f"text_encoder.encoder.layer.{DEPTH - 1}.", f"{prefix}encoder.layer.{index}."),
                shape,
            )

    if kind != "retrieval":
        for name in [name for name in made if name.startswith(("vision_proj.", "text_proj.", "itm_head."))]:
            del made[name]
    if kind in ("nlvr", "entailment"):
        made |= {"cls_head.0.weight": (WIDTH, WIDTH), "cls_head.0.bias": (WIDTH,)}
        classes = 2 if kind == "nlvr" else 3
        made |= {"cls_head.2.weight": (classes, WIDTH), "cls_head.2.bias": (classes,)}
    if kind == "nlvr":
        for index in (DEPTH, DEPTH + 1):
            made |= dict(copied(index))
    if kind == "vqa":
        decoder = "text_decoder.bert."
        for index in range(DEPTH // 2):
            made |= dict(copied(index, decoder, WIDTH))
        made |= {
            name.replace("text_encoder.", decoder): shape
            for name, shape in made.items()
            if name.startswith("text_encoder.embeddings.")
        }
        made |= {
            name.replace("text_encoder.", "text_decoder."): shape
            for name, shape in shapes().items()
            if name.startswith("text_encoder.cls.")
        }
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in made.items()}
    for prefix in ("text_encoder.", "text_decoder.bert."):
        if f"{prefix}embeddings.word_embeddings.weight" in state:
            state[f"{prefix}embeddings.position_ids"] = torch.arange(20)[None]
    if kind == "vqa":
        head = "text_decoder.cls.predictions"
        state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    if kind == "nlvr":
        for index in range(DEPTH // 2, DEPTH + 2, 2):
            for leaf in ("key.weight", "key.bias", "value.weight", "value.bias"):
                name = "text_encoder.encoder.layer.{}.crossattention.self." + leaf
                state[name.format(index)] = state[name.format(index + 1)]
    for name in list(state):
        tower = name.partition(".")[0]
        if tower != "itm_head" and "position_ids" not in name:
            state[name.replace(tower, f"{tower}_m", 1)] = state[name] + 1
    if kind == "retrieval":
        state |= {
            "temp": torch.tensor(0.03), "image_queue": torch.randn(EMBED, 8), "text_queue": torch.randn(EMBED, 8),
            "idx_queue": torch.full((1, 8), -100), "queue_ptr": torch.zeros(1, dtype=torch.int64),
        }  # fmt: skip
    return state


TASKS = {
    "retrieval": ("albef", Albef),
    "vqa": ("albef_vqa", AlbefVqa),
    "nlvr": ("albef_nlvr", AlbefNlvr),
    "entailment": ("albef_classifier", AlbefClassifier),
}
TEXT = torch.tensor([2, 7, 9, 11, 20])
ASKED = torch.cat([TEXT, torch.tensor([3])])[None]


def answer_of(kind, model, pixels):
    """What the model says of TEXT and pictures, with whatever it has learned to say."""
    if kind == "retrieval":
        return model.match_logits(TEXT[None], None, model.encode_image(pixels[:1]))[0]
    if kind == "vqa":
        states = model.encode_question(ASKED, ASKED > 0, model.encode_image(pixels[:1]))
        return model.answer_logits(ASKED, ASKED > 0, model.prefill_cross(states), ASKED > 0)[0]
    return model.judge(ASKED, ASKED > 0, pixels[None, : model.pictures])[0]


def published(kind, state, pixels):
    """The same by the released code's pass over a file's tensors."""
    seen = [plain.picture(state, each, 3) for each in (pixels if kind == "nlvr" else pixels[:1])]
    depth = DEPTH + 2 if kind == "nlvr" else DEPTH
    x = plain.read(state, "text_encoder.", TEXT, depth, DEPTH // 2, 2, seen)
    if kind == "retrieval":
        return plain.linear(state, "itm_head", x[0])
    if kind != "vqa":
        return plain.linear(state, "cls_head.2", plain.linear(state, "cls_head.0", x[0]).clamp(min=0))
    answer = plain.embedded(state, "text_decoder.bert.", ASKED[0])
    for index in range(DEPTH // 2):
        answer = plain.layer(state, f"text_decoder.bert.encoder.layer.{index}", answer, 2, x, causal=True)
    words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    return plain.named(state, "text_decoder.cls.predictions.", words, answer)


@pytest.mark.parametrize("kind", TASKS)
@torch.no_grad()
def test_a_finetuned_file_says_the_same_in_every_layout_that_has_a_place_for_it(kind, tmp_path, small_bert):
    """A published finetuned ALBEF that is refused, taken for another task's, or says something else than the published pass
    over its tensors, at first or after having travelled."""
    state = finetuned(kind)
    pixels = torch.randn(2, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(1))
    expected = published(kind, state, pixels)
    (tmp_path / "albef").mkdir()
    place = write(tmp_path / "albef", state)
    name, model_class = TASKS[kind]
    for number, layout in enumerate(("original", "capfilt", "original", "capfilt")):
        contents, meta = checkpoint.open_any(place)
        assert type(contents.model) is model_class
        assert meta["model_type"] == name
        config = contents.model.config
        assert type(config).from_dict(checkpoint.read_config(place)["config"]) == config
        torch.testing.assert_close(answer_of(kind, contents.model, pixels), expected, atol=1e-5, rtol=1e-5)
        kept = {
            each for each in state if each.partition(".")[0].endswith(("_m", "_queue")) or each == "queue_ptr"
        }
        assert set(contents.leftovers) == kept
        export(place, layout, tmp_path / str(number))
        place = tmp_path / str(number)
    written = torch.load(tmp_path / "2" / "model.pth", weights_only=True)["model"]
    assert {each: tensor.shape for each, tensor in written.items()} == {
        each: tensor.shape for each, tensor in state.items()
    }
    torch.testing.assert_close(published(kind, written, pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TASKS)
def test_a_finetuned_file_with_a_key_too_many_or_too_few_is_refused_by_it(kind, tmp_path):
    state = finetuned(kind)
    lost = state.pop("text_encoder.encoder.layer.3.crossattention.self.query.bias")
    with refused("missing", "layer.3.crossattention.self.query.bias"):
        checkpoint.open_any(write(tmp_path, state))
    state["text_encoder.encoder.layer.3.crossattention.self.query.bias"] = lost
    state["text_encoder.pooler.dense.weight"] = state["ta_head.bias"] = torch.zeros(3)
    with refused("2 tensors", "ta_head.bias", "text_encoder.pooler.dense.weight"):
        checkpoint.open_any(write(tmp_path, state))


def test_what_was_not_published_stays_here(tmp_path, small_bert):
    """Exported under names that read back as another model, or that nothing reads."""
    start = build(
        AlbefConfig(
            VisionConfig(16, 8, 16, 1, 2, 16), TextConfig(WORDS_KNOWN, 16, 4, 2, 16, max_positions=20)
        )
    )
    shallow = build(dataclasses.replace(start.config, text=dataclasses.replace(start.config.text, depth=2)))
    for number, (model, why) in enumerate(
        (
            (classifier_from_albef(start, "vqa", ("a", "b")), "AlbefClassifier vqa"),
            (nlvr_from_albef(start, classes=ASSIGNED), "text assignment"),
            (nlvr_from_albef(shallow), "layers"),
        )
    ):
        checkpoint.save(tmp_path / str(number), model, small_bert)
        with refused(why):
            export(tmp_path / str(number), "original", tmp_path / "no")
    with refused("head", "words"):
        vqa_from_albef(build(dataclasses.replace(start.config, words=False)))


def test_positions_are_resized(path, state):
    model = checkpoint.open_any(path, image_size=PATCH * 5)[0].model
    assert torch.equal(
        model.visual_encoder.pos_embed, resize_position_embedding(state["visual_encoder.pos_embed"], 5)
    )


@torch.no_grad()
def test_it_travels_to_every_layout_that_has_a_place_for_it_and_back(path, state, tmp_path, small_bert):
    first = checkpoint.open_any(path)[0]
    place = path
    for number, layout in enumerate(("capfilt", "original", "original", "capfilt")):
        export(place, layout, tmp_path / str(number))
        place = tmp_path / str(number)
        contents = checkpoint.open_any(place)[0]
        assert contents.model.config == first.model.config
        for name, each in first.model.state_dict().items():
            assert torch.equal(contents.model.state_dict()[name], each), (layout, name)
        assert contents.leftovers.keys() == first.leftovers.keys()
    written = torch.load(tmp_path / "1" / "model.pth", weights_only=True)["model"]
    assert written.keys() == state.keys()
    assert all(written[name].shape == each.shape for name, each in state.items())
    # The file that was written says the same, by its own names.
    pixels, ids = seen_and_said()
    for name in ("text_encoder.bert.", "text_encoder_m.bert."):
        before, after = (
            plain.read(each, name, ids, DEPTH, 2, 2, [plain.picture(each, pixels, 3)])
            for each in (state, written)
        )
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    with refused("ALBEF", "layout transformers"):
        export(place, "transformers", tmp_path / "no")


@torch.no_grad()
def test_a_bert_and_a_deit_start_an_albef(tmp_path):
    transformers = pytest.importorskip("transformers")
    geometry = {"num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": HIDDEN}
    bert = loud(
        transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=38, hidden_size=WIDTH, max_position_embeddings=20, **geometry)
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    deit = loud(
        transformers.DeiTModel(
            transformers.DeiTConfig(image_size=16, patch_size=8, hidden_size=WIDTH, layer_norm_eps=1e-6, **geometry)
        )
    )  # fmt: skip
    deit.save_pretrained(tmp_path / "deit")
    model = build(
        AlbefConfig(
            vision=VisionConfig(32, 8, WIDTH, DEPTH, 2, HIDDEN),
            text=TextConfig(38, WIDTH, DEPTH, 2, HIDDEN, max_positions=20),
        )
    ).eval()
    fresh = {name: each.clone() for name, each in model.state_dict().items()}
    load_vit(model.visual_encoder, tmp_path / "deit")
    start_text(model, tmp_path / "bert")
    kept = {name for name, each in model.state_dict().items() if torch.equal(each, fresh[name])}
    # LayerNorms and biases of what is fresh start as they would have anyway; nothing else may be left as it was.
    assert kept == {
        name
        for name in fresh
        if ".crossattention." in name or name.split(".")[0] in ("vision_proj", "text_proj", "itm_head", "temperature")
    }  # fmt: skip
    ids = torch.randint(0, 38, (2, 6))
    # With nothing to see, all layers are BERT's: its first type included, and its head names the tokens.
    states = model.text_encoder(ids)
    torch.testing.assert_close(states, bert.bert(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    words = model.text_encoder.embeddings.word_embeddings.weight
    torch.testing.assert_close(model.mlm_head(states, words), bert(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.visual_encoder.norm.bias, deit.layernorm.bias)
