"""Catches: a compiled tower that answers otherwise, is compiled anew at every start or for every size of batch, changes the
caller's model, or is written where another process writes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capfilt.inference import compiling
from capfilt.inference.compiling import CACHE, compiled_tower

SCRIPT = """
import sys, time, torch
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models import build
from capfilt.models.blip.model import BlipConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig

torch.set_num_threads(1)
tokenizer = Tokenizer([*SPECIALS, "a", "dog", *ADDED])
text = TextConfig(tokenizer.vocab_size, 16, 1, 2, 32, max_positions=32)
model = build(BlipConfig(vision=VisionConfig(16, 8, 16, 1, 2, 32), text=text, embed_dim=8)).eval()
images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
(plain,) = Captioner(model, tokenizer).encode(images).parts
fast, other = Captioner(model, tokenizer, compiled=True), Filter(model, tokenizer)
for rows in (7, 4, 2):
    found = fast.encode(images[:rows])
    torch.testing.assert_close(found.parts[0], plain[:rows], atol=1e-5, rtol=1e-5)
fast.share_vision(other)
other.score_texts(fast.encode(images), [0, 3], ["a dog", "a"])
from torch._dynamo.utils import counters
assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
assert type(model.visual_encoder).__name__ == "VisionTower" and Captioner(model, tokenizer).compiled is None
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_second_start_compiles_nothing(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": root}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split()[-2:])
    assert said == [["0", "1"], ["1", "0"]], "hits and misses of PyTorch's cache"
    directory = tmp_path / ".cache" / "capfilt" / "torchinductor"
    assert [each.name.rpartition("-")[2] for each in directory.iterdir()] == ["0"]


class Child:
    """A process that compiles a tower, says where its work is kept, and lives until it is killed, for a minute at most."""

    def __init__(self, ends):
        ends.callback(self.kill)
        reading, writing = os.pipe()
        self.process = os.fork()
        if not self.process:
            try:
                said = where()
            except BaseException as error:  # noqa: BLE001
                said = repr(error)
            os.write(writing, said.encode())
            signal.alarm(60)
            signal.pause()
        os.close(writing)
        self.place = os.read(reading, 4096).decode()
        os.close(reading)

    def kill(self):
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        self.process = 0


def where():
    compiled_tower(SimpleNamespace(visual_encoder=None))
    return os.environ[CACHE]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Set first, so that what the code sets is undone.
    monkeypatch.setenv(CACHE, "")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    yield tmp_path / "capfilt" / "torchinductor"
    compiling.own_directory.cache_clear()
    while compiling._locks:
        compiling._locks.pop().close()


def test_each_running_process_has_a_directory_of_its_own_and_the_next_finds_it(home):
    """Two that compile into one directory at once read each other's half; and a child took its parent's by the environment."""
    mine = where()
    assert where() == mine, "one for all towers of a process"
    assert Path(mine).parent == home
    with contextlib.ExitStack() as ends:
        first, second = Child(ends), Child(ends)
        assert len({mine, first.place, second.place}) == 3
        assert {Path(each).parent for each in (first.place, second.place)} == {home}
        first.kill()
        assert Child(ends).place == first.place, "what it compiled is there, however it ended"


def test_a_directory_that_the_environment_names_is_kept(home, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    assert where() == str(tmp_path / "mine")
    assert not home.exists()


@pytest.mark.parametrize("fault", ["a file in the way", "no locks"])
def test_a_home_that_cannot_keep_it_costs_a_compilation_and_no_more(home, monkeypatch, fault):
    if fault == "no locks":

        def refused(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("capfilt.inference.compiling.fcntl.flock", refused)
    else:
        home.parent.write_text("")
    place = Path(where())
    try:
        assert place.is_dir()
        assert home not in place.parents
    finally:
        place.rmdir()
