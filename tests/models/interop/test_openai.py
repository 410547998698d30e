"""Catches a CLIP in OpenAI's layout that a user cannot open or write, that is read with other heads or another activation than
it was trained with, or whose file runs code.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile

import pytest
import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.errors import UserError
from capfilt.models import checkpoint
from capfilt.models.clip.layouts import OPENAI
from capfilt.models.clip.model import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.export import export
from tests.models.interop.clips import RESNET, VIT, sharpened
from tests.refusals import refused
from tests.worlds import tiny_checkpoint

NUMBERS = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}


@pytest.fixture(scope="module")
def tokenizer():
    return BpeTokenizer.train(["a photo of a dog", "a dog on a beach"] * 3, 530)


def made(config, tokenizer):
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size)
    return sharpened(dataclasses.replace(config, text=text))


def told(directory, state, said):
    """The config of a file of these tensors, with what open_clip says of them beside it."""
    (directory / "open_clip_config.json").unlink(missing_ok=True)
    if said is not None:
        (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": said}))
    return OPENAI.told(directory / "clip.pt", state)[0]


def same(contents, model) -> None:
    assert contents.model.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(contents.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("config", [
    VIT,
    RESNET,
    dataclasses.replace(VIT, activation="gelu", logit_bias=True, max_text_tokens=9, max_words=5),
    # Heads that no width tells: 4 of 32 channels, 2 of 24.
    dataclasses.replace(
        VIT, vision=ClipVisionConfig(32, 8, 128, 2, 4, 250), text=ClipTextConfig(99, 16, 48, 2, 2, 100)
    ),
])  # fmt: skip
def test_there_and_back(tmp_path, tokenizer, config):
    model = made(config, tokenizer)
    checkpoint.save(tmp_path / "ours", model, tokenizer, {"note": "kept"})
    assert export(tmp_path / "ours", "openai", tmp_path / "theirs") == [
        f"wrote {tmp_path / 'theirs'}: clip, layout openai"
    ]
    assert checkpoint.layout_of(tmp_path / "theirs") == "openai"
    assert checkpoint.read_config(tmp_path / "theirs")["config"] == model.config.to_dict()
    contents, meta = checkpoint.open_any(tmp_path / "theirs")
    same(contents, model)
    assert (meta["layout"], contents.extra) == ("openai", {"note": "kept"})
    assert contents.tokenizer.fingerprint == tokenizer.fingerprint
    # The file by itself is the same checkpoint, and every file beside it counts.
    file = tmp_path / "theirs" / "open_clip_model.safetensors"
    mark = checkpoint.fingerprint(file)
    assert mark == checkpoint.fingerprint(tmp_path / "theirs")
    (tmp_path / "theirs" / "open_clip_config.json").write_text('{"model_cfg": {}}')
    assert checkpoint.fingerprint(file) != mark
    export(tmp_path / "ours", "capfilt", tmp_path / "again")
    same(checkpoint.open_any(tmp_path / "again")[0], model)


@pytest.mark.parametrize("name", ["ViT.pt", "epoch_3.pt", "open_clip_pytorch_model.bin"])
def test_tensors_are_read_as_openai_and_open_clip_save_them(tmp_path, tokenizer, name):
    config = dataclasses.replace(VIT, vision=ClipVisionConfig(32, 8, 128, 2, 2, 256))
    model = made(config, tokenizer)
    state = OPENAI.given(model.config, model.state_dict())
    tokenizer.save(tmp_path)
    if name == "ViT.pt":
        # OpenAI's own: half precision, and the three numbers.
        state = {
            key: each.half().float().half() if each.is_floating_point() else each
            for key, each in state.items()
        }
        torch.save({**state, **NUMBERS}, tmp_path / name)
    elif name == "epoch_3.pt":
        trained = {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{key}": each for key, each in state.items()},
        }
        torch.save(trained, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    if name != "ViT.pt":
        with refused("activation", "open_clip_config.json"):
            checkpoint.open_any(tmp_path / name)
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    for place in (tmp_path / name, tmp_path):
        contents, meta = checkpoint.open_any(place)
        assert meta["layout"] == "openai"
        assert contents.model.config.activation == "quick_gelu"
        for key, tensor in model.state_dict().items():
            expected = tensor.half().float() if name == "ViT.pt" and tensor.is_floating_point() else tensor
            assert torch.equal(contents.model.state_dict()[key], expected), key


def test_heads_that_widths_do_not_tell_are_asked_for(tmp_path):
    def state(config: ClipConfig):
        with torch.device("meta"):
            return {**OPENAI.given(config, Clip(config).state_dict()), **NUMBERS}

    # open_clip's ViT-H-14: 16 heads of 80, where 64 would make 20.
    huge = ClipConfig(
        ClipVisionConfig(28, 14, 1280, 1, 16, 5120), ClipTextConfig(99, 16, 1024, 1, 16, 4096), 1024, "gelu"
    )
    with refused("heads", 1280, "vision_cfg.head_width"):
        told(tmp_path, state(huge), None)
    with refused("heads", 1280):
        told(tmp_path, state(huge), {"quick_gelu": False})
    found = told(
        tmp_path, state(huge), {"vision_cfg": {"width": 1280, "head_width": 80}, "text_cfg": {"heads": 16}}
    )
    assert found == huge
    odd = dataclasses.replace(huge, vision=ClipVisionConfig(28, 14, 96, 1, 2, 96))
    with refused("heads", 96):
        told(tmp_path, state(odd), None)
    # What a table of open_clip's leaves out is open_clip's default.
    sizes = {"vision": ClipVisionConfig(28, 14, 128, 1, 2, 96), "text": ClipTextConfig(99, 16, 128, 1, 8, 96)}
    narrow = dataclasses.replace(huge, **sizes)
    said = {"vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}
    assert told(tmp_path, state(narrow), said) == narrow


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"custom_text": True}, "model_cfg says custom_text True"),
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name 'vit'"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type 'avg'"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask True"),
    ],
)
def test_what_no_clip_of_ours_has_is_refused(tmp_path, tokenizer, said, message):
    model = made(VIT, tokenizer)
    state = OPENAI.given(model.config, model.state_dict())
    fine = {
        "vision_cfg": {"pool_type": "tok", "no_ln_pre": False, "ls_init_value": None},
        "text_cfg": {"pool_type": "argmax"},
    }
    assert told(tmp_path, state, fine).activation == "gelu"
    with pytest.raises(UserError, match=message):
        told(tmp_path, state, said)


def test_other_normalisation_models_and_archives_are_refused(tmp_path, tokenizer):
    # What tells TorchScript from torch's own archives.
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/constants.pkl", b"")
    with refused("TorchScript", "torch.jit.load"):
        checkpoint.open_any(tmp_path / "ViT-B-32.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    with refused("other.bin", "openai"):
        checkpoint.open_any(tmp_path / "other.bin")
    model = made(VIT, tokenizer)
    checkpoint.save(tmp_path / "ours", model, tokenizer)
    export(tmp_path / "ours", "openai", tmp_path / "theirs")
    path = tmp_path / "theirs" / "open_clip_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    with refused("mean"):
        checkpoint.open_any(tmp_path / "theirs")
    tiny_checkpoint(tmp_path / "blip")
    with refused("BLIP", "openai"):
        export(tmp_path / "blip", "openai", tmp_path / "blip-openai")
    assert not (tmp_path / "blip-openai").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"preprocess_cfg": 1.5},
        {"preprocess_cfg": {"mean": 7}},
        {"model_cfg": {"vision_cfg": "ab"}},
        {"model_cfg": {"text_cfg": {"heads": "x" * 9}}},
        {"model_cfg": {"vision_cfg": [1]}},
    ],
)
def test_settings_of_an_unexpected_kind_are_refused_in_one_line(tmp_path, tokenizer, change):
    """A number for a table ended capfilt with a traceback."""
    checkpoint.save(tmp_path / "ours", made(VIT, tokenizer), tokenizer, {})
    export(tmp_path / "ours", "openai", tmp_path / "theirs")
    path = tmp_path / "theirs" / "open_clip_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refused():
        checkpoint.open_any(tmp_path / "theirs")


@pytest.mark.parametrize("cleaning", [{}, [], 7, "polish"])
def test_a_cleaning_that_is_none_is_refused_by_name(tmp_path, tokenizer, cleaning):
    """A table in the place of a name ended capfilt with a traceback."""
    checkpoint.save(tmp_path / "ours", made(VIT, tokenizer), tokenizer, {"note": "kept"})
    export(tmp_path / "ours", "openai", tmp_path / "theirs")
    path = tmp_path / "theirs" / "capfilt.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cleaning": cleaning}))
    with refused("capfilt.json", "cleaning"):
        checkpoint.open_any(tmp_path / "theirs")
