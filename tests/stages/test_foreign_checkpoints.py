"""Catches: a stage that opens capfilt's own checkpoints only, or that writes rows of another checkpoint without noticing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from capfilt.cli import main
from capfilt.models import checkpoint
from capfilt.tables.workspace import Workspace
from tests.models.interop.reference import saved
from tests.worlds import image_rows, write_images

pytest.importorskip("transformers")


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in arguments])
    return stopped.value.code


def test_caption_score_and_export_take_transformers_directories(tmp_path, capsys):
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4)])
    saved(tmp_path / "blip", "captioner")
    saved(tmp_path / "itm", "filter")
    here = ("--execution", "inline", "-q", "-w", tmp_path / "ws")
    caption = ("caption", "--images", "web", "--captioner", tmp_path / "blip", "--max-new-tokens", 5, *here)
    assert call(*caption) == 0
    assert call("score", "--images", "web", "--captions", "blip", "--filter", tmp_path / "itm", *here) == 0
    captions = place.part("captions", "blip").read(0).to_pylist()
    assert len(captions) == 4
    scores = place.part("scores", "itm").read(0).to_pylist()
    written = [row for row in captions if row["text"]]
    assert written
    assert len(scores) == 4 + len(written)
    assert all(0 <= row["itm_score"] <= 1 for row in scores)

    # Another checkpoint at the same place: no row of it may pass for one of the first.
    saved(tmp_path / "blip", "captioner", seed=7)
    capsys.readouterr()
    assert call(*caption) == 2
    assert "captions/blip" in capsys.readouterr().err
    # The filter has no decoder to write with.
    assert call("caption", "--images", "web", "--captioner", tmp_path / "itm", "--out", "x", *here) != 0

    # Nor is that needed to rank texts, which a filter alone must be able to show.
    evaluate = (
        "evaluate",
        "--model",
        tmp_path / "itm",
        "--images",
        "web",
        "--split",
        "",
        "--rerank",
        2,
        *here,
    )
    capsys.readouterr()
    assert call(*evaluate, "--tasks", "captioning") == 2
    assert "--tasks captioning" in capsys.readouterr().err
    assert call(*evaluate, "--tasks", "retrieval") == 0

    # The lineage tells what each was made with, where it was and in which layout, without torch.
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from capfilt.catalog.report import write_report; from capfilt.tables.workspace import Workspace\n"
        f"write_report(Workspace({str(place.path)!r}), {str(tmp_path / 'report.html')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    page = (tmp_path / "report.html").read_text()
    rows = {row[: row.index("<")]: row for row in page.split("<h2>Lineage")[1].split("<tr><td>")[1:]}
    itm = f"itm (transformers, {checkpoint.fingerprint(tmp_path / 'itm')[:12]})"
    first = place.part("captions", "blip").info["identity"]["captioner"]
    assert f"blip (transformers, {first[:12]})" in rows["captions/blip"]
    assert itm in rows["scores/itm"]
    assert itm in rows["runs/itm"]

    # A checkpoint that was moved is the same checkpoint.
    (tmp_path / "itm").rename(tmp_path / "moved")
    score = ("score", "--images", "web", "--captions", "blip", "--filter", tmp_path / "moved", "--out", "itm")
    assert call(*score, *here) == 0
    (tmp_path / "moved").rename(tmp_path / "itm")

    exported = tmp_path / "ws" / "models" / "filter"
    assert call("export", tmp_path / "itm", "--to", "capfilt", "--out", exported) == 0
    assert "filter, layout capfilt" in capsys.readouterr().out
    assert call("score", "--images", "web", "--filter", "filter", *here) == 0
    again = place.part("scores", "filter").read(0).to_pylist()
    first = {row["text_id"]: row["itm_score"] for row in scores}
    assert len(again) == 4
    # Scored without their pictures' other texts, which share a matrix product with them: rounding may differ.
    assert all(row["itm_score"] == pytest.approx(first[row["text_id"]], abs=1e-6) for row in again)
