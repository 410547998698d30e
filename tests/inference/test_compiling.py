"""Catches: a compiled tower that answers otherwise, is compiled anew at every start or for every size of batch, or changes the
caller's model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time, torch
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models.blip import BlipConfig, build
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig

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
    assert (tmp_path / ".cache" / "capfilt" / "torchinductor").is_dir()
