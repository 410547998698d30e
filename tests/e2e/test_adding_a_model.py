"""Catches a family that has to touch capfilt, that is trained as another, or that forgets a part and is not refused.

The package is that of docs/adding-a-model.md, word for word, installed beside capfilt with its entry point.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from capfilt import models
from capfilt.cli import main
from capfilt.tables.workspace import Workspace
from tests.plugins.packages import install, use
from tests.worlds import image_rows, write_images

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-model.md"
MOST_LINES = 120


def install_documented(site: Path, change: tuple[str, str] = ("", "")) -> Path:
    """The package of the page; `change`: a text of it, and another in its place."""
    assert change[0] in PAGE.read_text()
    text = PAGE.read_text().replace(*change) if change[0] else PAGE.read_text()
    (project,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    entries = tomllib.loads(project)["project"]["entry-points"]
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        file = site / code.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    install(site, "toy_meta", "", entries)
    return site


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def run(tmp_path, workspace):
    """Calls capfilt in a process that has the package."""
    images = workspace.part("images", "human")
    write_images(images, [image_rows("human", 12, source="human")])
    write_images(workspace.part("images", "web"), [image_rows("web", 6, source="web")])
    site = install_documented(tmp_path / "site")
    root = str(Path(__file__).resolve().parents[2])

    def started(*words, **more):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), root]), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "capfilt",
            *words,
            "-w",
            str(workspace.path),
            "--execution",
            "inline",
            "-q",
        ]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
        )

    return started


TRAIN = (
    "retrain", "toy", "--human", "human", "--preset", "tiny", "--vocab-size", "200", "--batch-size", "4", "--save-every", "2",
    "--warmup-steps", "1",
)  # fmt: skip


def finish(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_the_page_is_short():
    assert len(PAGE.read_text().splitlines()) <= MOST_LINES


def test_a_family_of_another_package_is_trained_killed_resumed_evaluated_and_judges(run, workspace):
    train = [*TRAIN, "--steps", "120"]
    process = run(*train, "--out", "toy")
    state = workspace.model("toy") / "state.safetensors"
    until = time.monotonic() + 120
    while not state.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert state.is_file()
    assert not (workspace.model("toy") / "config.json").exists()
    for out in ("toy", "whole"):
        finish(run(*train, "--out", out))
    resumed, whole = (workspace.model(out) / "model.safetensors" for out in ("toy", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    config = json.loads((workspace.model("toy") / "config.json").read_text())
    assert (config["model_type"], config["extra"]["identity"]["family"]) == ("toy", "toy")
    finish(run("evaluate", "--model", "toy", "--images", "human", "--split", "", "--out", "judged"))
    result = json.loads((workspace.path / "runs" / "judged.json").read_text())
    assert 0 <= result["metrics"]["tr@1"] <= 100
    finish(run("score", "--images", "web", "--filter", "toy"))
    half = ("--by", "itc_score", "--keep-fraction", "0.5", "--out", "half")
    finish(run("select", "--images", "web", "--scores", "toy", *half))
    verdicts = [
        row for table in workspace.part("verdicts", "half").tables(["keep"]) for row in table.to_pylist()
    ]
    assert 0 < sum(row["keep"] for row in verdicts) < len(verdicts)


MISSING = {
    "PRESETS": ('PRESETS = {"tiny"', 'SIZES = {"tiny"'),
    "objective": ("def objective(", "def losses_of("),
    "abilities": ('    abilities = ("features", "embed")\n', ""),
    "embed_text": ("def embed_text(", "def embed_words("),
    "losses": ("def losses(self", "def loss(self"),
    "blocks": ("def blocks(self", "def layers(self"),
    "Toys": ('"toy_family.model:Toy"', '"toy_family.model:Toys"'),
    "toy_family.net": ('code="toy_family.model"', 'code="toy_family.net"'),
    "'draw'": ('("features", "embed")', '("features", "draw")'),
}


@pytest.mark.parametrize("part", MISSING)
def test_a_family_that_forgets_a_part_is_refused_with_its_name(
    part, tmp_path, workspace, monkeypatch, capsys
):
    write_images(workspace.part("images", "human"), [image_rows("human", 4, source="human")])
    use(
        monkeypatch,
        install_documented(tmp_path / "site", change=MISSING[part]),
        "toy_family",
        "toy_family.model",
    )
    models._foreign.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        main([*TRAIN, "--steps", "1", "--out", "x", "-w", str(workspace.path), "--execution", "inline", "-q"])
    models._foreign.cache_clear()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(rf"model family toy: .*{re.escape(part)}", said), said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("record", "why"),
    [("FAMILY = 3\n", "is no Family"), ("raise ValueError('broken')\n", "broken")],
)
def test_a_record_that_cannot_be_used_is_warned_of_and_the_others_work(
    record, why, tmp_path, monkeypatch, capsys
):
    site = install(tmp_path / "site", "bad_family", record, {"capfilt.models": {"bad": "bad_family:FAMILY"}})
    use(monkeypatch, site, "bad_family")
    models._foreign.cache_clear()
    with pytest.warns(RuntimeWarning, match=why):
        assert [family.name for family in models.families()] == ["blip", "clip", "vilt", "albef", "locked"]
    models._foreign.cache_clear()
