"""Would catch: a figure cut off in a narrow terminal, a bar in a name that breaks a Markdown table, JSON that says something
else than the table, a metric left out, pictures that were lost and not told of, two runs of one name shown as one, and
markup in a file's name that the terminal obeys."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from capfilt import results
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.tables.workspace import Workspace
from capfilt.tasks.outcome import pack, units
from tests.refusals import refused


def write(place, name, share, **content):
    hits = (np.random.default_rng(0).random(200) < share).astype(float)
    made = units("mean", hits, [f"image {number}" for number in range(200)])
    path = place.path / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "name": name, "model": "BLIP", "checkpoint": "f" * 64, "split": "test", "fingerprint": "e" * 32,
                "origins": {"f" * 64: {"given": "models/it", "layout": "capfilt"}},
                "metrics": {"tr@1": round(made.value(), 3), "meteor": 12.0},
                "intervals": {"tr@1": {"value": 1.0, "low": 20.25, "high": 30.5}}, "baselines": {"tr@1": 0.5},
                "bootstrap": {"resamples": 200, "seed": 0, "level": 0.95},
                "tasks": {
                    "retrieval": {"protocol": "cosine", "metrics": ["tr@1"], "counts": {"images": 200},
                                  "left_out": {"split": 9, "task": 8, "no_image": 1234, "limit": 7}},
                    "captioning": {
                        "protocol": "greedy", "metrics": ["meteor"], "counts": {"images": 200},
                        "details": {"skipped": {"spice": "there is no `java` on the PATH"}},
                    },
                },
                "units": {"tr@1": made.as_dict()},
                "queries": {made.queries: {"groups": pack(made.groups), "number": len(made.names)}},
                "captions": {"image": "a dog"}, **content,
            }
        )
    )  # fmt: skip
    return path


@pytest.fixture
def place(tmp_path):
    place = Workspace(tmp_path)
    write(place, "raw", 0.2)
    write(place, "curated", 0.4)
    return place


def shown(place, *names, form="table"):
    out = io.StringIO()
    results.show(place, names, form, out)
    return out.getvalue()


def test_one_run_is_a_table_with_everything(place):
    text = shown(place, "curated")
    assert "curated: BLIP models/it (ffffffffffff), split test" in text
    (row,) = [line.split() for line in text.splitlines() if "tr@1" in line]
    assert row[:2] == ["retrieval", "tr@1"]
    assert row[3:] == ["[20.25,", "30.50]", "0.50"]
    assert "captioning: spice skipped: there is no `java` on the PATH" in text
    assert "intervals: 95%, 200 resamples of whole images where a task says no other, seed 0" in text
    assert "retrieval: left out: 1,234 no_image, 7 limit" in text.splitlines()
    assert "captioning: left out" not in text
    content = json.loads(shown(place, "curated", form="json"))
    assert content["metrics"]["meteor"] == 12.0
    assert "units" not in content


def test_runs_side_by_side_say_what_is_outside_the_interval(place):
    text = shown(place, "raw", "curated", form="markdown")
    lines = text.splitlines()
    assert "| figure | raw | curated | curated − raw |" in lines
    (row,) = [line for line in lines if line.startswith("| tr@1")]
    assert row.endswith("above |")
    assert "| meteor | 12.00 | 12.00 | +0.00 |" in lines
    content = json.loads(shown(place, "raw", "curated", form="json"))
    found = content["figures"]["tr@1"]["differences"]["curated"]
    assert (found["verdict"], found["paired"]) == ("above", True)
    assert found["interval"]["low"] > 0
    assert [run["name"] for run in content["runs"]] == ["raw", "curated"]


def test_runs_of_one_name_stay_two(place, tmp_path):
    """Two files called test.json, of which the second must not stand in for both."""
    elsewhere = Workspace(tmp_path / "other")
    path = str(write(elsewhere, "raw", 0.6))
    text = shown(place, "raw", path, "raw", form="markdown")
    (head,) = [line for line in text.splitlines() if line.startswith("| figure")]
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells[1:4] == ["raw", path, "raw (2)"]
    values = json.loads(shown(place, "raw", path, "raw", form="json"))["figures"]["tr@1"]["values"]
    assert len(values) == 3
    assert values["raw"] == values["raw (2)"] != values[path]


def test_no_verdict_over_other_numbers_says_why(place):
    few = {"retrieval": {"protocol": "cosine", "metrics": ["tr@1"], "counts": {"images": 100}}}
    write(place, "few", 0.9, tasks=few)
    text = shown(place, "raw", "few")
    assert "no verdict: the figure depends on how much it is measured over, and that differs" in text
    assert "above" not in next(line for line in text.splitlines() if line.startswith("tr@1"))


def test_names_are_text_and_nothing_else(place):
    write(place, "a|[red]b", 0.3)
    assert "a|[red]b" in shown(place, "raw", "a|[red]b")
    assert "| figure | raw | a\\|[red]b |" in shown(place, "raw", "a|[red]b", form="markdown")


def test_a_narrow_terminal_cuts_nothing(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    rows = [line for line in shown(place, "raw", "curated").splitlines() if line.startswith("tr@1")]
    assert len(rows) == 1
    assert rows[0].endswith("above")


def test_after_an_evaluation_the_table_is_shown_and_written(place, tmp_path):
    out, target = io.StringIO(), tmp_path / "tables" / "curated.md"
    path = place.path / "runs" / "curated.json"
    results.shown_after(path, EvaluateOptions(images="x", markdown=str(target)), True, out)
    assert out.getvalue() == ""
    assert "| retrieval | tr@1 |" in target.read_text()
    results.shown_after(path, EvaluateOptions(images="x"), False, out)
    assert "tr@1" in out.getvalue()


def test_unknown_runs_and_forms(place):
    with refused("nowhere.json"):
        shown(place, "raw", "nowhere")
    with refused("--format html"):
        shown(place, "raw", form="html")
