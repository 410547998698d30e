"""Bugs caught here: a state that needs pickle, is torn by a crash, loses what shared modules share, or is loaded into
another model without a word.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capfilt.errors import RunError
from capfilt.training import optim, state
from tests.refusals import refused
from tests.sweeps.disk import durable_steps


class Shared(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Sequential(self.first, nn.Linear(width, width))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

    def losses(self):
        return self.second(torch.randn(2, self.first.in_features)).square().mean()


def made(width=3, seed=0):
    torch.manual_seed(seed)
    module = Shared(width)
    return module, optim.AdamW(optim.trainable(module))


def step(module, optimizer):
    module.losses().backward()
    optimizer.step(0.1)
    optimizer.zero_grad()


def test_round_trip_continues_as_if_nothing_happened(tmp_path):
    module, optimizer = made()
    module.count += 5
    step(module, optimizer)
    cpu = torch.device("cpu")
    tensors = state.capture(module, optimizer) | state.capture_random(cpu)
    state.write(tmp_path / "state.safetensors", tensors, {"a": 0.1})
    step(module, optimizer)
    other, other_optimizer = made(seed=9)
    tensors, values = state.read(tmp_path / "state.safetensors")
    assert values == {"a": 0.1}
    state.restore_module(other, tensors)
    state.restore_optimizer(other_optimizer, tensors)
    state.restore_random(tensors, cpu)
    step(other, other_optimizer)
    assert other.second[0] is other.first
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_other_models_and_other_files_are_refused_by_name(tmp_path):
    module, optimizer = made()
    tensors = state.capture(module, optimizer)
    with refused("another model"):
        state.restore_module(made(width=4)[0], tensors)
    with refused("module.first.bias"):
        state.restore_module(module, {k: v for k, v in tensors.items() if k != "module.first.bias"})
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"\x80\x04not a state")
    with refused(path):
        state.read(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with refused(path, "no training state"):
        state.read(path)


def test_every_byte_of_a_state_counts(tmp_path):
    """Catches a run that continues from moments or weights which a disk has changed: length, header, tensors, digest."""
    path = tmp_path / "state.safetensors"
    state.write(
        path,
        {"module.x": torch.arange(5.0), "random.cpu": torch.zeros(3, dtype=torch.uint8)},
        {"step": 1, "a": " "},
    )
    whole = path.read_bytes()
    for place in range(len(whole)):
        # White space becomes other white space, which JSON would not mind.
        flip = ord(" ") ^ ord("\t") if whole[place] == ord(" ") else 1 << place % 8
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        with refused(path):
            state.read(path)
    for cut in (whole[:-1], whole + b"\0", b"", whole[:8]):
        path.write_bytes(cut)
        with refused(path):
            state.read(path)
    path.write_bytes(whole)
    assert state.read(path)[1] == {"step": 1, "a": " "}


def test_a_state_from_before_states_had_a_digest_is_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "s.safetensors", {"capfilt_training_state": '{"step": 4}'})
    assert state.read(tmp_path / "s.safetensors")[1] == {"step": 4}


def test_a_failed_write_leaves_the_old_state(tmp_path):
    path = tmp_path / "state.safetensors"
    state.write(path, {"x": torch.ones(1)}, {"step": 1})
    (tmp_path / "state.safetensors.part").mkdir()
    with pytest.raises((RunError, OSError)):
        state.write(path, {"x": torch.zeros(1)}, {"step": 2})
    assert state.read(path)[1] == {"step": 1}


def test_a_state_is_on_the_disk_before_its_name_and_the_newest_goes_last(tmp_path, monkeypatch):
    """A power cut left an empty file as the newest state; a kill while states were removed left the numbered for good."""
    steps = durable_steps(monkeypatch, tmp_path)
    path = tmp_path / "state.safetensors"
    for step in (1, 2):
        del steps[:]
        state.write_newest(path, step, {"x": torch.ones(1)}, {"step": step}, keep=2)
        numbered = f"state-0000000{step}.safetensors"
        assert steps[:3] == [f"sync {numbered} attempt", f"name {numbered}", "sync ."]
        assert steps[3:5] == ["name state.safetensors attempt", "name state.safetensors"]

    def unlink(place, missing_ok=False):
        removed.append(place.name)

    removed: list[str] = []
    monkeypatch.setattr(type(path), "unlink", unlink)
    state.remove(path)
    assert removed[-1] == "state.safetensors"
    assert len(removed) == 4
