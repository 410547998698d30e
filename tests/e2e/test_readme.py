"""Catches a README whose commands do not run one after the other: its chain for one's own corpus as it is typed there, in tiny.

Only sizes are changed (`SMALLER`), and the address of the pictures is allowed. Then each further model is retrained and
evaluated, and the rest of README's words are said: compare, query, report, doctor.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.download.web import Server, needs_img2dataset
from tests.worlds import jpeg

README = Path(__file__).resolve().parents[2] / "README.md"
TINY = "--preset tiny --steps 2 --batch-size 4 --no-augment"
SMALLER = {
    "--preset base": f"{TINY} --vocab-size 60",
    "finetune captioner": "finetune captioner --steps 2 --batch-size 4",
    "finetune filter": "finetune filter --steps 2 --batch-size 4",
    "--threshold 0.5": "--threshold 0",  # so little training keeps nothing at 0.5
    "capfilt pretrain": "capfilt pretrain --queue-size 8",
    "capfilt retrain blip": "capfilt retrain blip --queue-size 8",
}


def typed(heading: str) -> list[list[str]]:
    """The commands of the first block under a heading of the README, comments left out."""
    text = README.read_text().partition(f"## {heading}\n")[2]
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1]
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    commands = []
    for line in filter(None, lines):
        for words, smaller in SMALLER.items():
            line = line.replace(words, smaller)
        commands.append(shlex.split(line)[1:])
    return commands


@pytest.fixture
def world(tmp_path):
    """A person's own files: a list in Karpathy's layout beside its pictures, and URLs, one of which comes the second time."""
    (tmp_path / "train").mkdir()
    colours = ["red", "green", "blue", "white"]
    images = []
    for number in range(12):
        colour = colours[number % 4]
        (tmp_path / "train" / f"{number}.jpg").write_bytes(jpeg(colour, seed=number))
        sentences = [{"raw": f"a {colour} square number {number}"}]
        split = "test" if number >= 8 else "train"
        images.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences})
    (tmp_path / "captions_train.json").write_text(json.dumps({"images": images}))
    server = Server()
    urls = [server.url(path) for path in ("good", "wide", "flaky/x", "png", "webp")]
    pq.write_table(
        pa.table({"url": urls, "caption": [f"a {colours[n % 4]} square" for n in range(5)]}),
        tmp_path / "urls.parquet",
    )
    yield tmp_path, server
    server.stop()


@pytest.mark.slow
@needs_img2dataset
def test_the_chain_of_the_readme_runs_as_it_is_typed(world, monkeypatch, capsys):
    from capfilt.cli import main

    place, server = world
    monkeypatch.chdir(place)

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*words])
        out, err = capsys.readouterr()
        assert stopped.value.code == 0, (words, out, err)
        assert "Traceback" not in err
        return out

    for words in typed("Your own corpus"):
        allowed = (
            ["--allow-host", f"127.0.0.1:{server.port}"]
            if words[0] == "download" and "--retry" not in words
            else []
        )
        run(*words, *allowed)
    for model in ("clip", "vilt", "albef"):
        queue = ["--queue-size", "8"] if model == "albef" else []
        run(
            "retrain",
            model,
            "--human",
            "human",
            "--pairs",
            "capfilt",
            *TINY.split(),
            *queue,
            "--out",
            model,
        )
        assert "tr@1" in run("evaluate", "--model", model, "--images", "human", "--split", "test")
    assert "clip" in run("compare", "retrained", "clip", "vilt", "albef")
    assert run("query", "SELECT count(*) FROM pairs", "--format", "csv").split()[1] != "0"
    run("report")
    assert (place / "report.html").stat().st_size > 10_000
    assert "BAD" not in run("doctor", "--verify")
