"""Catches a result that is overwritten by another run's, written with a figure that is no number, or made twice."""

from __future__ import annotations

import json
import math

import pytest

from capfilt.errors import RunError, UserError
from capfilt.stages.results import ResultStage


class Counting(ResultStage):
    name, version = "count", 1

    def __init__(self, output, figure=1.0, options=None, gaps=None):
        self.output, self.figure, self.options, self.gaps = output, figure, options or {}, gaps or {}
        self.runs = 0

    def identity(self):
        return {"options": self.options}

    def outlook(self):
        return "count"

    def measure(self, report):
        self.runs += 1
        return {"metrics": {"accuracy": self.figure}, "texts": 3}


def report(*_):
    return None


def test_a_result_is_written_once_with_what_made_it(tmp_path):
    path = tmp_path / "runs" / "mine.json"
    stage = Counting(path, options={"seed": 1}, gaps={"images/web": "1 of 2 shards"})
    assert not stage.done()
    assert stage.standing() == []
    assert stage.run(report) == {"accuracy": 1.0, "texts": 3}
    content = json.loads(path.read_text())
    assert (content["name"], content["stage"], content["identity"]) == (
        "mine",
        "count",
        {"options": {"seed": 1}},
    )
    assert content["metrics"] == {"accuracy": 1.0}
    assert content["incomplete_inputs"] == {"images/web": "1 of 2 shards"}
    assert content["fingerprint"] == stage.fingerprint()
    assert stage.done()
    assert stage.standing() == [path]
    assert "incomplete_inputs" not in json.loads(_run(tmp_path / "whole.json").read_text())


def _run(path):
    Counting(path).run(report)
    return path


@pytest.mark.parametrize("changed", [{"options": {"seed": 2}}, {"version": 2}, {"name": "grade"}])
def test_another_runs_result_is_in_the_way_and_stays(tmp_path, changed):
    path = _run(tmp_path / "mine.json")
    before = path.read_bytes()
    other = Counting(path, options=changed.get("options"))
    for name in ("version", "name"):
        if name in changed:
            setattr(other, name, changed[name])
    with pytest.raises(UserError, match=r"mine\.json.*--out"):
        other.done()
    assert path.read_bytes() == before


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_writes_nothing(tmp_path, figure):
    stage = Counting(tmp_path / "mine.json", figure)
    with pytest.raises(RunError, match=r"mine\.json"):
        stage.run(report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "standing"), [("[]", False), ("{}", False), ('{"fingerprint": "x"}', True)]
)
def test_only_what_capfilt_wrote_counts_as_standing(tmp_path, content, standing):
    (tmp_path / "mine.json").write_text(content)
    stage = Counting(tmp_path / "mine.json")
    assert bool(stage.standing()) == standing
    with pytest.raises(UserError, match=r"mine\.json"):
        stage.done()


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"mine\.json"):
        Counting(tmp_path / "mine.json").done()
