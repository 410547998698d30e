"""Catches: a foreign checkpoint taken for another, a key silently dropped or made up, a file that runs code when it is
opened, positions left at another size, a fingerprint that misses a change, an error that does not name its file or key.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from capfilt.errors import UserError
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models import checkpoint, layouts
from capfilt.models.blip.layouts import ORIGINAL, TRANSFORMERS
from capfilt.models.blip.tasks import BlipNlvr
from capfilt.models.common.vision import resize_position_embedding
from tests.models.interop.reference import DEC, DEPTH, PATCH, SIDE, pictures, saved, texts, write_vocabulary
from tests.refusals import refused

pytest.importorskip("transformers")

# Written apart from the maps under test, the other way around, and by substitution where they list.
TO_ORIGINAL = [
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
]
SETTINGS = {"vision.heads": 3, "text.heads": 2, "text.dropout": 0.0, "text.attention_dropout": 0.0}


def original(directory, *models):
    """The state dictionary that the original code would have saved of these transformers models, and its file."""
    state = {}
    for model in models:
        for name, tensor in model.state_dict().items():
            for old, new in TO_ORIGINAL:
                name = name.replace(old, new)
            state[name] = tensor.clone()
    for root in ("text_encoder", "text_decoder.bert"):
        if f"{root}.embeddings.word_embeddings.weight" in state:
            state[f"{root}.embeddings.position_ids"] = torch.arange(20)[None]
    write_vocabulary(directory)
    (directory / "capfilt.json").write_text(json.dumps({"settings": SETTINGS, "extra": {}}))
    return state, directory / "model_base.pth"


def save(state, path):
    """A file as the original training loop writes it."""
    training = {"optimizer": {"state": {0: {"step": 3}}}, "config": {"vit": "base"}, "epoch": 3}
    torch.save({"model": state, **training}, path)
    return path


@pytest.fixture
def retrieval(tmp_path):
    """A retrieval checkpoint as the original code saves it, and the same model as transformers saves it."""
    theirs = saved(tmp_path / "hf", "filter")
    state, path = original(tmp_path / "original", theirs)
    state["temp"] = torch.tensor(0.03)
    for name in list(state):
        tower = name.partition(".")[0]
        if tower in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            state[name.replace(tower, f"{tower}_m", 1)] = state[name] + 1
    state |= {
        "image_queue": torch.randn(12, 8), "text_queue": torch.randn(12, 8), "idx_queue": torch.full((1, 8), -100),
        "ptr_queue": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    return state, path, tmp_path / "hf"


@torch.no_grad()
def test_a_retrieval_checkpoint_with_its_training_state(retrieval):
    state, path, directory = retrieval
    save(state, path)
    found = checkpoint.open_any(path)[0]
    ours, twin = found.model, checkpoint.load(directory)[0]
    images, (ids, mask) = pictures(2), texts(2, [6, 4])
    assert torch.equal(ours.encode_image(images), twin.encode_image(images))
    tokens = ours.encode_image(images)
    assert torch.equal(ours.match_logits(ids, mask, tokens), twin.match_logits(ids, mask, tokens))
    assert torch.equal(ours.embed_text(ids, mask), twin.embed_text(ids, mask))
    assert float(ours.temperature.detach()) == pytest.approx(0.03)
    expected = {name for name in state if "_m." in name or "queue" in name}
    assert found.leftovers.keys() == expected
    assert all(torch.equal(found.leftovers[name], state[name]) for name in expected)


@torch.no_grad()
def test_a_captioning_and_an_answering_checkpoint(tmp_path):
    images, (ids, mask) = pictures(2), texts(DEC, [6, 4])
    captioner = saved(tmp_path / "captioner", "captioner")
    state, path = original(tmp_path / "a", captioner)
    assert "text_decoder.cls.predictions.decoder.weight" in state, "the tied copies should be in the file"
    ours, twin = checkpoint.load(save(state, path))[0], checkpoint.load(tmp_path / "captioner")[0]
    tokens = twin.encode_image(images)
    assert torch.equal(
        ours.lm_logits(ids, mask, ours.encode_image(images)), twin.lm_logits(ids, mask, tokens)
    )
    answering = saved(tmp_path / "vqa", "vqa")
    state, path = original(tmp_path / "b", answering)
    found = [checkpoint.open_any(each)[0].model for each in (save(state, path), tmp_path / "vqa")]
    states = [model.encode_question(ids, mask, model.encode_image(images)) for model in found]
    logits = [
        m.answer_logits(ids, mask, m.prefill_cross(s), mask) for m, s in zip(found, states, strict=True)
    ]
    assert torch.equal(*logits)


@pytest.fixture
def nlvr2(retrieval):
    """A filter as the original code makes an NLVR2 model of it, with what it adds, and its file."""
    state, path, _ = retrieval
    state = {
        name: each
        for name, each in state.items()
        if name.partition(".")[0] in ("visual_encoder", "text_encoder")
    }
    for name in [
        name for name in state if "crossattention.self." in name or "crossattention.output.dense." in name
    ]:
        tensor = state.pop(name)
        state[name.replace("crossattention.self.", "crossattention.self0.").replace("dense", "dense0")] = (
            tensor
        )
        state[name.replace("crossattention.self.", "crossattention.self1.").replace("dense", "dense1")] = (
            tensor + 0.1
        )
    merge = "text_encoder.encoder.layer.1.crossattention.output.merge_layer"
    state |= {
        f"{merge}.weight": torch.randn(16, 32), f"{merge}.bias": torch.randn(16),
        "cls_head.0.weight": torch.randn(16, 16), "cls_head.0.bias": torch.randn(16),
        "cls_head.2.weight": torch.randn(2, 16), "cls_head.2.bias": torch.randn(2),
    }  # fmt: skip
    return state, path


@torch.no_grad()
def test_an_nlvr2_checkpoint(nlvr2):
    state, path = nlvr2
    model = checkpoint.open_any(save(state, path))[0].model
    assert isinstance(model, BlipNlvr)
    assert (model.config.image_size, model.config.vision.heads, model.config.text.heads) == (SIDE, 3, 2)
    ours = model.state_dict()
    assert ORIGINAL.given(model.config, ours).keys() == ours.keys() | {"text_encoder.embeddings.position_ids"}
    assert all(torch.equal(ours[name], state[name]) for name in ours)
    assert state.keys() - ours.keys() == {"text_encoder.embeddings.position_ids"}


@pytest.mark.parametrize("broken", [
    "text_encoder.encoder.layer.0.crossattention.self1.key.weight",
    "text_encoder.encoder.layer.1.crossattention.output.merge_layer.bias",
    "cls_head.2.bias",
])  # fmt: skip
def test_one_broken_key_of_an_nlvr2_checkpoint_is_named(nlvr2, broken):
    state, path = nlvr2
    wrong = broken.replace("self1", "self2").replace("layer.1", "layer.0").replace("head.2", "head.3")
    state[wrong] = state.pop(broken)
    with refused("missing", broken):
        checkpoint.open_any(save(state, path))
    state[broken] = state[wrong]
    with refused("BLIP", wrong):
        checkpoint.open_any(save(state, path))


def test_the_maps_name_every_tensor_of_a_model_once(retrieval):
    state, path, directory = retrieval
    del state
    for kind in ("captioner", "filter", "vqa"):
        saved(path.parent / kind, kind)
        model = checkpoint.open_any(path.parent / kind)[0].model
        theirs = load_file(path.parent / kind / "model.safetensors").keys()
        given = TRANSFORMERS.given(model.config, model.state_dict())
        assert given.keys() == theirs
        # The temperature has no home there.
        assert len(given) == len(model.state_dict()) - (kind == "filter")
    assert directory.is_dir()


def change(state, name, edit):
    state[name] = edit(state[name]) if name in state else edit(None)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "text_encoder.gate.weight",
            lambda _: torch.zeros(1),
            "1 tensors text_encoder.gate.weight",
        ),
        ("text_encoder.embeddings.position_ids", lambda t: t + 1, "position_ids"),
        (
            "visual_encoder.norm.weight",
            lambda t: t[:-1],
            "visual_encoder.norm.weight [23] [24]",
        ),
        ("visual_encoder.pos_embed", lambda t: t[:, :-1], "pos_embed 8 rows"),
        ("cls_head.0.weight", lambda _: torch.zeros(16, 16), "missing: cls_head.0.bias"),
    ],
)
def test_an_unexplained_or_wrong_tensor_is_listed(retrieval, name, edit, message):
    state, path, _ = retrieval
    change(state, name, edit)
    with refused(path, message):
        checkpoint.load(save(state, path))


def test_missing_untied_and_unshared_tensors_are_listed(retrieval, tmp_path):
    state, path, _ = retrieval
    del state["itm_head.bias"], state["text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    with refused("2 tensors", "itm_head.bias", "crossattention.self.key.weight"):
        checkpoint.load(save(state, path))
    state, path = original(tmp_path / "c", saved(tmp_path / "captioner", "captioner"))
    change(state, "text_decoder.cls.predictions.decoder.bias", lambda t: t + 1)
    with refused("decoder.bias", "cls.predictions.bias"):
        checkpoint.load(save(state, path))
    state, path = original(
        tmp_path / "d", saved(tmp_path / "f", "filter"), saved(tmp_path / "g", "captioner", seed=8)
    )
    state["temp"] = torch.tensor(0.07)
    with refused("text_decoder.bert.", "text_encoder."):
        checkpoint.load(save(state, path))


class Planted:
    """Runs when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_a_file_that_would_run_code_is_refused(retrieval):
    state, path, _ = retrieval
    for content in ({"model": state, "config": Planted()}, Planted()):
        torch.save(content, path)
        with refused(path, "tensors"):
            checkpoint.load(path)
    path.write_bytes(b"no archive")
    with refused("model_base.pth"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], "dictionary tensors"), ({"model": {}}, "dictionary tensors"),
     ({"model": {"a": 1}}, "dictionary tensors"),
     ({"model": {"a": torch.zeros(1)}}, "BLIP original"),
     ({"model": {"a": torch.zeros(1), 3: torch.zeros(1)}}, "dictionary tensors")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(retrieval, content, message):
    _, path, _ = retrieval
    torch.save(content, path)
    with refused(message):
        checkpoint.load(path)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrap", "ignored"),
    [
        (lambda s: s, None),
        (lambda s: {"model": s}, None),
        (lambda s: {"model": s, "optimizer": {}, "config": {}, "scaler": None, "iters": 9}, "config, iters, optimizer, scaler"),
        (lambda s: {"state_dict": s, "epoch": 1, "ema": {"a": torch.zeros(1)}}, "ema, epoch"),
        (lambda s: {"model_state_dict": s}, None),
        (lambda s: {"module": s}, None),
        (lambda s: {"model": prefixed("module.", s)}, r"prefix module\. of"),
        (lambda s: prefixed("_orig_mod.", s), r"prefix _orig_mod\. of"),
        (lambda s: {"model": prefixed("module._orig_mod.", s)}, r"prefix module\._orig_mod\. of"),
        (lambda s: {"state_dict": prefixed("model.", s), "loops": {}}, r"keys loops and the prefix model\. of"),
    ],
    ids=["bare", "blip", "lavis", "state_dict", "model_state_dict", "deepspeed", "ddp", "compiled", "both", "lightning"],
)  # fmt: skip
def test_wrappers_alone_make_no_other_checkpoint(tmp_path, wrap, ignored):
    """Catches weights refused for what a trainer saved around them, and something left out without a word."""
    state, path = original(tmp_path / "original", saved(tmp_path / "captioner", "captioner"))
    torch.save(wrap(state), path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        found = checkpoint.load(path)[0]
    expected = checkpoint.load(tmp_path / "captioner")[0]
    assert all(torch.equal(each, found.state_dict()[name]) for name, each in expected.state_dict().items())
    # Once, however often the file is looked into.
    messages = [str(each.message) for each in told if "ignored" in str(each.message)]
    assert len(messages) == (ignored is not None)
    assert ignored is None or re.search(ignored, messages[0])


@pytest.fixture
def shards(tmp_path):
    """A captioner as transformers saves it in shards, and the same in one file."""
    theirs = saved(tmp_path / "whole", "captioner")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    write_vocabulary(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def test_shards_and_their_index_are_one_checkpoint(shards, tmp_path):
    """Catches shards that are refused, read in part, or left out of the fingerprint; pickled shards too."""
    whole = checkpoint.load(tmp_path / "whole")[0].state_dict()
    found = checkpoint.load(shards)[0].state_dict()
    assert all(torch.equal(each, found[name]) for name, each in whole.items())
    before = checkpoint.fingerprint(shards)
    part = sorted(shards.glob("*.safetensors"))[1]
    tensors = load_file(part)
    change(tensors, min(tensors), lambda tensor: tensor + 1)
    save_file(tensors, part)
    assert checkpoint.fingerprint(shards) != before
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "whole", pickled)
    (pickled / "model.safetensors").unlink()
    places = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    for file in set(index["weight_map"].values()):
        torch.save(load_file(shards / file), pickled / file.replace(".safetensors", ".bin"))
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert checkpoint.load(pickled)[0].config == checkpoint.load(shards)[0].config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda places, name: places.update({name: "../whole/model.safetensors"}), "no name"),
        (lambda places, name: places.update({name: "/etc/model.safetensors"}), "no name"),
        (lambda places, name: places.update({name: "sub/a.safetensors"}), "no name"),
        (lambda places, name: places.update({name: ".."}), "no name"),
        (lambda places, name: places.update({name: "config.json"}), "no name"),
        (lambda places, name: places.update({name: 7}), "table files"),
        (lambda places, name: places.clear(), "table files"),
        (lambda places, name: places.update({name: "gone.safetensors"}), "gone.safetensors"),
        (lambda places, name: places.update({"other.weight": places[name]}), "shard other.weight"),
    ],
)
def test_an_index_names_whole_files_beside_it_and_nothing_else(shards, edit, message):
    """Catches an index that leads out of its directory, or whose shards are not whole."""
    path = shards / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    edit(content["weight_map"], min(content["weight_map"]))
    path.write_text(json.dumps(content))
    with refused(shards, message):
        checkpoint.load(shards)


def test_a_tensor_that_two_shards_have_is_refused(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with refused("another shard"):
        checkpoint.load(shards)


@torch.no_grad()
def test_positions_are_resized_on_load(retrieval):
    state, path, directory = retrieval
    save(state, path)
    wider = SIDE + 2 * PATCH
    expected = resize_position_embedding(state["visual_encoder.pos_embed"], wider // PATCH)
    content = json.loads((directory / "config.json").read_text())
    for place in (path, directory):
        model = checkpoint.load(place, image_size=wider)[0]
        assert model.config.image_size == wider
        assert torch.equal(model.visual_encoder.pos_embed, expected)
        assert model.encode_image(torch.zeros(1, 3, wider, wider)).shape[1] == (wider // PATCH) ** 2 + 1
    # A config that asks for other pictures than the file was trained with means them.
    content["vision_config"]["image_size"] = wider
    (directory / "config.json").write_text(json.dumps(content))
    assert torch.equal(checkpoint.load(directory)[0].visual_encoder.pos_embed, expected)
    assert Filter.load(path, image_size=wider).model.config.image_size == wider


def test_engines_want_their_own_half(tmp_path, retrieval):
    state, path, directory = retrieval
    saved(tmp_path / "captioner", "captioner")
    saved(tmp_path / "vqa", "vqa")
    assert isinstance(Captioner.load(tmp_path / "captioner"), Captioner)
    for place in (save(state, path), directory):
        assert isinstance(Filter.load(place), Filter)
        with refused(place, "filter", "captioner"):
            Captioner.load(place)
    with refused(tmp_path / "captioner", "filter"):
        Filter.load(tmp_path / "captioner")
    with refused(tmp_path / "vqa", "questions"):
        Captioner.load(tmp_path / "vqa")


def test_the_config_is_told_without_the_weights_and_the_fingerprint_sees_every_file(retrieval):
    state, path, directory = retrieval
    save(state, path)
    first = checkpoint.fingerprint(path)
    for place, changed in (
        (path, ("model_base.pth", "vocab.txt", "capfilt.json")),
        (directory, ("model.safetensors", "vocab.txt", "config.json")),
    ):
        meta = checkpoint.read_config(place)
        assert meta["config"] == checkpoint.load(place)[0].config.to_dict()
        assert (meta["model_type"], meta["extra"]) == ("blip", {})
        root = place if place.is_dir() else place.parent
        before = checkpoint.fingerprint(place)
        assert before == checkpoint.fingerprint(place)
        for name in changed:
            content = (root / name).read_bytes()
            (root / name).write_bytes(content + b"\n")
            assert checkpoint.fingerprint(place) != before, name
            (root / name).write_bytes(content)
        assert checkpoint.fingerprint(place) == before
    path.rename(path.with_name("renamed.pth"))
    assert (
        checkpoint.fingerprint(path.with_name("renamed.pth")) == checkpoint.fingerprint(path.parent) == first
    )


def test_a_config_that_this_blip_is_not_is_named(retrieval):
    _, _, directory = retrieval
    content = json.loads((directory / "config.json").read_text())
    for table, key, value in (
        ("text_config", "hidden_act", "relu"), ("vision_config", "layer_norm_eps", 1e-3),
        ("text_config", "bos_token_id", 5), ("text_config", "sep_token_id", 5),
        ("text_config", "num_attention_heads", 3), ("vision_config", "image_size", [24, 32]),
    ):  # fmt: skip
        edited = {**content, table: {**content[table], key: value}}
        (directory / "config.json").write_text(json.dumps(edited))
        with pytest.raises(UserError, match=rf"config\.json: .*({key}|heads)"):
            checkpoint.load(directory)
    (directory / "config.json").write_text(json.dumps({**content, "architectures": ["BlipModel"]}))
    with refused("BlipForImageTextRetrieval"):
        checkpoint.load(directory)


def test_half_precision_is_read_without_loss(retrieval):
    _, _, directory = retrieval
    weights = {name: each.half() for name, each in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors")
    model = checkpoint.load(directory)[0]
    assert model.itm_head.weight.dtype == torch.float32
    assert torch.equal(model.itm_head.weight.half(), weights["itm_head.weight"])
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert torch.equal(checkpoint.load(directory)[0].itm_head.weight, model.itm_head.weight)


def test_the_vocabulary_is_checked_and_transformers_own_is_read(retrieval):
    from transformers import BertTokenizer

    _, _, directory = retrieval
    before = checkpoint.load(directory)[1]
    theirs = BertTokenizer(
        vocab={before.token(i): i for i in range(before.vocab_size - 2)}, do_lower_case=True
    )
    theirs.save_pretrained(directory)
    (directory / "vocab.txt").unlink(missing_ok=True)
    assert (directory / "tokenizer.json").is_file()
    assert checkpoint.load(directory)[1].fingerprint == before.fingerprint
    content = json.loads((directory / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with refused("tokenizer.json", "normalizer"):
        checkpoint.load(directory)
    (directory / "tokenizer.json").unlink()
    with refused("tokenizer.json", "vocab.txt"):
        checkpoint.load(directory)
    (directory / "vocab.txt").write_text("\n".join(before.token(i) for i in range(before.vocab_size - 3)))
    with refused("vocab.txt", "29 tokens", 30):
        checkpoint.load(directory)


def test_places_that_are_no_checkpoint(tmp_path, retrieval):
    state, path, _ = retrieval
    save(state, path)
    assert layouts.locate(path.parent) == (ORIGINAL, path)
    save(state, path.with_name("other.pth"))
    with refused(path.parent, "2 files"):
        checkpoint.load(path.parent)
    with refused("vocab.txt", ".pth", ".pt"):
        checkpoint.load(path.with_name("vocab.txt"))
    with refused("hf download some-owner/some-model"):
        checkpoint.load("some-owner/some-model")


def test_the_file_says_its_heads_or_asks_for_them(retrieval):
    state, path, _ = retrieval
    (path.parent / "capfilt.json").unlink()
    with refused("heads", 24, "vision.heads"):
        checkpoint.load(save(state, path))
    (path.parent / "capfilt.json").write_text(
        json.dumps({"settings": {"vision.width": 9, **SETTINGS}, "extra": {}})
    )
    with refused("vision.width"):
        checkpoint.load(path)
    assert DEPTH == 2


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": 7},
        {"architectures": [{}, None]},
        {"architectures": "BlipForConditionalGeneration"},
        {"text_config": {"vocab_size": []}},
        {"text_config": {"vocab_size": "many"}},
        {"vision_config": {"image_size": {}}},
        {"text_config": {"hidden_dropout_prob": 3, "attention_probs_dropout_prob": "x"}},
        {"text_config": {"pad_token_id": 999}},
        {"text_config": {"num_hidden_layers": 999}},
        {"vision_config": {"num_hidden_layers": 999}},
    ],
)
def test_settings_of_an_unexpected_kind_are_refused_in_one_line(tmp_path, change):
    """A list for a number ended capfilt with a traceback."""
    saved(tmp_path / "blip", "captioner")
    path = tmp_path / "blip" / "config.json"
    content = json.loads(path.read_text())
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    with refused(tmp_path / "blip"):
        checkpoint.open_any(tmp_path / "blip")


def test_an_archive_whose_list_of_members_is_damaged_is_refused_in_one_line(retrieval):
    """`zipfile` has errors of its own for each byte of that list."""
    state, path, _ = retrieval
    save(state, path)
    whole = path.read_bytes()
    start, refused = whole.rindex(b"PK\x01\x02") - 200, []
    for place in (*range(start, len(whole), 7), len(whole) - 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                checkpoint.open_any(path)
            except UserError as error:
                refused.append(str(error))
    assert refused
    assert not [each for each in refused if "\n" in each]


@pytest.mark.parametrize(
    "change", [lambda t: t[None], lambda t: t[0], lambda t: t.flatten(), lambda t: t[:, :1]]
)
def test_positions_of_another_form_are_refused_in_one_line(retrieval, change):
    """torch's own error of a reshape ended capfilt with a traceback."""
    _, _, directory = retrieval
    weights = load_file(directory / "model.safetensors")
    name = "vision_model.embeddings.position_embedding"
    save_file({**weights, name: change(weights[name]).clone()}, directory / "model.safetensors")
    with pytest.raises(UserError) as caught:
        checkpoint.load(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
