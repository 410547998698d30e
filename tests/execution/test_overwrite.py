"""Would catch: an output in the way whose error names no way out; --overwrite that removes without asking, removes an
input or a folder of somebody else's, leaves the record behind, or does nothing without saying so."""

from __future__ import annotations

import io
import sys

import pytest

from capfilt.cli import main
from capfilt.tables.workspace import Workspace
from tests.worlds import image_rows, tiny_checkpoint, write_images

TRAIN = ("pretrain", "--web", "train", "--preset", "tiny", "--batch-size", "2", "--image-size", "32", "--queue-size", "0",
         "--momentum", "0")  # fmt: skip


@pytest.fixture
def place(tmp_path):
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4, split="test")])
    write_images(place.part("images", "train"), [image_rows("train", 4, split="train")])
    tiny_checkpoint(place.model("filter"), seed=2)
    return place


@pytest.fixture
def call(place, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "-w", str(place.path), "--execution", "inline", "-q"])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


SCORE = ("score", "--images", "web", "--filter", "filter")
CASES = {
    "a part": (SCORE, (), ("--precision", "bf16"), ("scores/filter", ".capfilt/scores/filter")),
    "two parts": (
        ("select", "--images", "web"), ("--keep-fraction", "0.5"), ("--keep-fraction", "0.25"),
        ("verdicts/capfilt", ".capfilt/verdicts/capfilt", "pairs/capfilt", ".capfilt/pairs/capfilt"),
    ),
    "a checkpoint": (TRAIN, ("--steps", "1"), ("--steps", "2"), ("models/pretrained",)),
    "a result": (
        ("evaluate", "--images", "web", "--model", "filter", "--resamples", "0"), ("--rerank", "0"), ("--rerank", "2"),
        ("runs/filter.json",),
    ),
}  # fmt: skip


@pytest.fixture(params=[*CASES])
def standing(request, place, call):
    """A command of which the output stands; other options for it; the files and folders."""
    command, before, after, paths = CASES[request.param]
    if command[0] == "select":
        assert call(*SCORE)[0] == 0
        command = (*command, "--scores", "filter")
    assert call(*command, *before)[0] == 0
    return (*command, *after), [place.path / path for path in paths]


def test_what_stands_names_two_ways_out_and_either_works(standing, call):
    command, paths = standing
    code, _, err = call(*command)
    assert code == 2
    assert len(err.splitlines()) == 1
    for word in ("--out NAME", "--overwrite", *map(str, paths[:2])):
        assert word in err
    assert call(*command, "--out", "other")[0] == 0
    before = [path.stat().st_mtime_ns for path in paths]
    code, out, err = call(*command, "--overwrite", "--yes")
    assert (code, err) == (0, "")
    assert out
    assert all(path.exists() for path in paths)
    assert before != [path.stat().st_mtime_ns for path in paths]
    assert "done before" in call(*command)[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("", 1), ("of course\n", 1)]
)
def test_somebody_is_asked(place, call, monkeypatch, answer, code):
    assert call(*SCORE)[0] == 0
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    before = sorted(place.path.rglob("*"))
    found, _, err = call(*SCORE, "--overwrite", "--precision", "bf16")
    assert found == code
    assert f"remove {place.path}/scores/filter and {place.path}/.capfilt/scores/filter? [y/N] " in err
    if code:
        assert sorted(place.path.rglob("*")) == before
        assert "left as it is" in err


def test_without_a_terminal_nothing_is_removed(standing, place, call, monkeypatch):
    command, _ = standing
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    before = sorted(place.path.rglob("*"))
    code, _, err = call(*command, "--overwrite")
    assert code == 2
    assert "--yes" in err
    assert len(err.splitlines()) == 1
    assert sorted(place.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("caption", "--images", "web", "--yes"), "--overwrite"),
        (("evaluate", "--images", "web", "--model", "filter", "--out", "./note.json"), "not readable"),
        (("finetune", "filter", "--human", "train", "--init", "filter", "--out", "filter"), "models/filter"),
        ((*TRAIN, "--out", "./notes"), "notes"),
        (("duplicates", "--images", "web", "--out", "./scores/notes"), "scores/notes"),
        (("score", "--images", "web", "--filter", "filter", "--out", "linked"), "is a link"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_no_input_and_nothing_of_somebody_elses_is_removed(place, call, monkeypatch, arguments, words):
    monkeypatch.chdir(place.path)
    assert call(*SCORE, "--out", "real")[0] == 0
    (place.path / "scores" / "linked").symlink_to(place.path / "scores" / "real")
    (place.path / ".capfilt" / "scores" / "linked").symlink_to(place.path / ".capfilt" / "scores" / "real")
    (place.path / "note.json").write_text("mine")
    for name in ("notes/config.json", "scores/notes/a.txt"):
        (place.path / name).parent.mkdir(parents=True, exist_ok=True)
        (place.path / name).write_text("{}")
    before = sorted(place.path.rglob("*"))
    code, _, err = call(*arguments, *(["--overwrite", "--yes"] if "--yes" not in arguments else []))
    assert code == 2, err
    assert words in err
    assert sorted(place.path.rglob("*")) == before


def test_a_part_that_a_retry_adds_to_stays(place, call):
    code = call("download", "--dataset", "web", "--retry", "failed", "--overwrite", "--yes")[0]
    assert code == 2
    assert place.part("images", "web").rows == 4
