"""Catches tensors that are put into a model though they are not its own, and files that cost or run more than they hold."""

from __future__ import annotations

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from capfilt.errors import UserError
from capfilt.models.common import weights as m
from tests.refusals import refused


class Tied(nn.Module):
    """A linear that stands in two places, as a decoder's layers stand in an encoder too."""

    def __init__(self, value=0.0):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.ModuleDict({"shared": self.first, "own": nn.Linear(2, 2)})
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        with torch.no_grad():
            for each in self.parameters():
                each.fill_(value)


STATE = {
    "first.weight": torch.ones(2, 2), "first.bias": torch.ones(2), "second.own.weight": torch.ones(2, 2),
    "second.own.bias": torch.ones(2), "count": torch.ones(3, dtype=torch.int64),
}  # fmt: skip


def test_a_shared_tensor_is_written_once_and_read_under_any_of_its_names(tmp_path):
    assert set(m.tensors(Tied())) == set(STATE)
    m.write_safetensors(tmp_path / "w", m.tensors(Tied(1.0)))
    assert set(m.read_safetensors(tmp_path / "w")) == set(STATE)
    others = {**STATE, "second.shared.weight": STATE["first.weight"]}
    renamed = {name: each for name, each in others.items() if name != "first.weight"}
    for state in (STATE, others, renamed):
        model = Tied()
        m.fill(tmp_path, model, state)
        assert model.second["shared"] is model.first
        assert model.first.weight.eq(1).all()
        assert model.count.eq(1).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first.bias": None}, "first.bias"),
        ({"third.bias": torch.ones(2)}, "third.bias"),
        ({"first.bias": torch.ones(3)}, "first.bias [3] [2]"),
        ({"first.bias": torch.tensor([1.0, float("nan")])}, "first.bias"),
        ({"first.weight": torch.full((2, 2), float("-inf"))}, "first.weight"),
        ({"second.shared.weight": torch.zeros(2, 2)}, "second.shared.weight first.weight"),
    ],
)
def test_a_state_that_is_not_the_models_is_refused_by_file_and_tensor(tmp_path, change, said):
    state = {name: each for name, each in {**STATE, **change}.items() if each is not None}
    model = Tied(0.5)
    with refused("model.bin", said):
        m.fill(tmp_path / "model.bin", model, state)
    assert model.first.weight.eq(0.5).all()


def test_many_names_are_a_few_and_a_number():
    assert m.listed(["a", "b"]) == "a, b"
    assert m.listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_what_a_start_leaves_out_must_be_new_and_what_it_gives_must_have_a_place():
    model = Tied()
    m.start_from(model, {"second.own.bias": torch.ones(2)}, lambda name: name != "second.own.bias")
    assert model.second["own"].bias.eq(1).all()
    assert model.first.bias.eq(0).all()
    for state, new in (
        ({"first.bias": torch.ones(2)}, lambda name: not name.startswith("second.own")),
        ({"third.bias": torch.ones(2)}, lambda name: True),
    ):
        with pytest.raises(ValueError, match=r"second\.own|third\.bias"):
            m.start_from(model, state, new)


@pytest.mark.parametrize("offset", range(4))
def test_a_tensor_lies_where_torchs_own_do(offset):
    whole = torch.arange(100, dtype=torch.float32)
    part = whole[offset * 4 + 1 :]
    moved = m.aligned(part)
    assert moved.data_ptr() % m.ALIGNMENT == 0
    assert torch.equal(moved, part)
    assert m.aligned(whole) is whole


@pytest.mark.parametrize(
    "data", [b"", b"x", (2**40).to_bytes(8, "little"), (8).to_bytes(8, "little") + b'{"a":[}}']
)
def test_bytes_that_are_no_safetensors_are_refused_by_name(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        m.read_safetensors(tmp_path / "model.safetensors")


def test_tensors_that_lie_apart_are_written_as_they_are(tmp_path):
    """safetensors refuses views and tensors that share memory."""
    whole = torch.arange(12.0).view(3, 4)
    m.write_safetensors(tmp_path / "w", {"a": whole.T, "b": whole[:, 1:2], "c": whole}, {"made": "here"})
    found = load_file(tmp_path / "w")
    assert torch.equal(found["a"], whole.T)
    assert torch.equal(found["b"], whole[:, 1:2])


class Touching:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_is_read_for_its_tensors_and_runs_nothing(tmp_path, mapped, zipped):
    path, touched = tmp_path / "model.pth", tmp_path / "touched"
    content = {"model": STATE, "epoch": 3, "args": ["a", None, 2.5]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = m.read_pickled(path, mapped)
    assert torch.equal(found["model"]["first.weight"], STATE["first.weight"])
    assert (found["epoch"], found["args"]) == (3, ["a", None, 2.5])
    torch.save({"model": STATE, "hook": Touching(touched)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"model\.pth"):
        m.read_pickled(path, mapped)
    assert not touched.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut", b"\x80", b"text", pickle.dumps({"a": 1}, 2)[:-3]])
def test_a_broken_pickle_is_refused_by_name(tmp_path, data):
    (tmp_path / "model.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.pth") as caught:
        m.read_pickled(tmp_path / "model.pth")
    assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused_unread(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10**6))
    with pytest.raises(UserError, match=r"bomb\.pth"):
        m.read_pickled(path)
    assert len(m.archive_members(path)) == 2
    assert m.archive_members(tmp_path / "none") == []
