"""Catches: a path taken for a plug-in, an unknown or broken plug-in that is a traceback, a plug-in that hands over less
than it was asked for, or a column no SQL can name, and built-ins that pyproject.toml and the checkout disagree about.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from capfilt.plugins.registry import (
    BUILT_IN,
    CAPTIONERS,
    SCORERS,
    checked_captions,
    checked_scores,
    open_captioner,
    open_scorer,
    reference,
)
from tests.plugins.packages import install, use
from tests.refusals import failed, refused

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

WHOLE = """
class Whole:
    columns = {"grade": "how good, in [0, 1]"}
    def __init__(self, argument, size="1"):
        if argument == "explodes":
            raise ValueError("no such\\nmodel")
        self.size = int(size)
    def fingerprint(self): return "whole"
    def setup(self): pass
    def prepare(self, data): return data
    def caption(self, images, keys, **rest): return []
    def score(self, images, image_index, texts, **rest): return []

class Nameless(Whole):
    def fingerprint(self): return ""

class Broken(Whole):
    def fingerprint(self): raise OSError("the disk is gone")

class Half:
    def __init__(self, argument): pass
    def fingerprint(self): return "half"
    def prepare(self, data): return data

def columns(argument):
    made = Whole("")
    made.columns = {"none": {}, "list": ["a"]}.get(argument, {argument: "a meaning"} if argument else {"grade": ""})
    return made

number = 3
"""


def named(given, *options, group=SCORERS):
    return reference(group, given, options, "--filter-option", Path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    names = {
        "whole": "whole:Whole", "nameless": "whole:Nameless", "broken": "whole:Broken", "half": "whole:Half",
        "columns": "whole:columns", "number": "whole:number", "absent": "whole:Missing", "needs": "needs:load",
    }  # fmt: skip
    site = install(tmp_path / "site", "whole", WHOLE, {SCORERS: names, CAPTIONERS: {"whole": "whole:Whole"}})
    (site / "needs.py").write_text("import a_package_that_is_not_there\n")
    use(monkeypatch, site, "whole", "needs")


@pytest.mark.parametrize(
    ("given", "plugin", "argument"),
    [
        ("clip:models/b32", "clip", "models/b32"),
        ("my-vlm.2:org/name:v1", "my-vlm.2", "org/name:v1"),
        ("api:", "api", ""),
        ("filter", "", "filter"),
        ("./clip:b32", "", "clip:b32"),
        ("/data/a:b", "", "/data/a:b"),
        ("Upper:x", "", "Upper:x"),
        ("a b:x", "", "a b:x"),
    ],
)
def test_what_is_a_plug_in_and_what_a_checkpoint(given, plugin, argument):
    found = named(given)
    assert (found.plugin, found.argument) == (plugin, argument)
    assert found.name == (plugin or Path(argument).name)


def test_entry_points_are_found_with_their_argument_and_options(installed):
    scorer = open_scorer(named("whole:x", "size=7"))
    assert scorer.size == 7
    assert named("whole:x").mark(scorer) == "whole:whole"
    assert open_captioner(named("whole:", group=CAPTIONERS)).size == 1


@pytest.mark.parametrize(
    ("given", "options", "group", "message"),
    [
        ("nobody:x", (), SCORERS, "nobody absent, broken, half"),
        ("nobody:x", (), CAPTIONERS, "captioner nobody whole"),
        ("needs:x", (), SCORERS, "needs needs:load ModuleNotFoundError:"),
        ("absent:x", (), SCORERS, "absent whole:Missing AttributeError"),
        ("number:x", (), SCORERS, "number 3"),
        ("whole:explodes", (), SCORERS, "whole explodes ValueError: model"),
        ("whole:x", ("colour=red",), SCORERS, "whole colour"),
        ("whole:x", ("size",), SCORERS, "--filter-option size KEY=VALUE"),
        ("whole:x", ("a b=1",), SCORERS, "--filter-option KEY=VALUE"),
        ("filter", ("size=1",), SCORERS, "filter checkpoint"),
        ("half:x", (), SCORERS, "half setup, score, columns"),
        ("nameless:x", (), SCORERS, "nameless fingerprint ''"),
        ("broken:x", (), SCORERS, "broken fingerprint OSError: disk"),
        ("columns:drop table", (), SCORERS, "drop table SQL"),
        ("columns:Grade", (), SCORERS, "Grade SQL"),
        ('columns:a"; DROP', (), SCORERS, "SQL"),
        ("columns:text_id", (), SCORERS, "text_id another column"),
        ("columns:keep", (), SCORERS, "keep another column"),
        ("columns:scorer", (), SCORERS, "scorer another column"),
        ("columns:", (), SCORERS, "grade meaning"),
        ("columns:none", (), SCORERS, "columns {}"),
        ("columns:list", (), SCORERS, "columns ['a'],"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plug_in_is_one_line_that_names_it(installed, given, options, group, message):
    def use_it():
        found = named(given, *options, group=group)
        return found.mark(open_scorer(found) if group == SCORERS else open_captioner(found))

    with refused(message):
        use_it()


def test_a_plug_in_may_fill_the_filter_s_columns(installed):
    assert open_scorer(named("columns:itm_score")).columns == {"itm_score": "a meaning"}


def test_one_name_from_two_packages_is_refused(installed, tmp_path, monkeypatch):
    use(monkeypatch, install(tmp_path / "other", "rival", "", {SCORERS: {"whole": "rival:load"}}))
    with refused("whole", "rival:load", "whole:Whole"):
        open_scorer(named("whole:x"))
    # The same package seen twice on the path is one.
    install(tmp_path / "other", "rival", WHOLE, {SCORERS: {"whole": "whole:Whole"}})
    use(monkeypatch, tmp_path / "other")
    open_scorer(named("whole:x"))


def test_the_metadata_declares_what_a_checkout_has():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    assert declared == {group: dict(names) for group, names in BUILT_IN.items() if names}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([("a", 0.0)], "1 captions 2"),
        ([("a", 0.0)] * 3, "3 captions 2"),
        (["a", "b"], "'a' log-probability"),
        ([("a", 0.0), (None, 0.0)], "(None, 0.0)"),
        ([("a", 0.0), ("b", "c")], "('b', 'c')"),
        ("ab", "'ab' list"),
        (None, "None list"),
    ],
)
def test_captions_that_are_not_what_was_asked_for(made, message):
    with failed("my-vlm", message):
        checked_captions(named("my-vlm:x", group=CAPTIONERS), made, 2)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([[0.5]], "[1, 1]; 2 texts"),
        ([0.5, 0.5], "[2]; 2 texts"),
        (np.zeros((2, 2)), "[2, 2];"),
        ([["a"], ["b"]], "rows numbers"),
        ([[0.5], [0.5, 0.5]], "rows numbers"),
        (None, "[];"),
    ],
)
def test_scores_that_are_not_what_was_asked_for(made, message):
    with failed("clip", message):
        checked_scores(named("clip:x"), made, 2, ["clip_score"])


@pytest.mark.parametrize("made", [[[0.5], [1]], np.array([[0.5], [1.0]]), torch.tensor([[0.5], [1.0]])])
def test_rows_of_numbers_in_any_form_are_scores(made):
    found = checked_scores(named("clip:x"), made, 2, ["clip_score"])
    assert found.dtype == np.float32
    assert found.tolist() == [[0.5], [1.0]]


def test_fp8_without_compiled_kernels_is_refused_before_anything_is_loaded():
    """A precision that is asked for its speed, and slower than bf16 without --compile."""
    with refused("--compile"):
        reference(SCORERS, "filter", (), "--filter-option", Path, "fp8")
    assert ("compiled", "yes") in reference(
        SCORERS, "filter", (), "--filter-option", Path, "fp8", True
    ).options
