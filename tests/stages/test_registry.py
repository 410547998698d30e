"""Would catch: a stage or a signal of another package that needs an edit of capfilt, works in some commands alone, or whose
fault is a traceback; documented packages that do not work.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from capfilt import recipe
from capfilt.catalog.query import query
from capfilt.catalog.report import write_report
from capfilt.cli import main
from capfilt.errors import UserError
from capfilt.stages.registry import GROUP, STAGES, stage_command
from capfilt.tables.contracts import SCORES
from capfilt.tables.manifest import Counts
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace
from tests.plugins.packages import install, use
from tests.refusals import refused
from tests.worlds import failed_row, image_rows, write_images

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXTS = ["a red square", "ein grünes Quadrat", "青い四角", " ", "click here", "Click here"]


def documented(site, page, name):
    """The package of a page of docs, word for word."""
    text = (DOCS / page).read_text()
    assert len(text.splitlines()) <= 60
    (module,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    line = re.search(r"\w+ = \"\w+:COMMAND\"", text)[0]
    return install(site, name, module, {GROUP: tomllib.loads(line)})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two shards of pictures with six texts, all of which have scores."""
    place = Workspace(tmp_path / "ws")
    shards = [image_rows("web", 3), [*image_rows("web", 3, start=20), failed_row("web", "lost")]]
    for row, text in zip((row for rows in shards for row in rows), [*TEXTS, "click: here!"], strict=True):
        row["captions"] = [text]
    images = write_images(place.part("images", "web"), shards)
    scores = place.part("scores", "filter")
    mark = scores.begin(SCORES, "test", {})
    for shard in images.shards():
        rows = [{**row, "itm_score": 0.9} for row in found_texts(images.read(shard)).to_pylist()]
        rows = [{name: row.get(name) for name in SCORES.schema.names} for row in rows]
        scores.commit(shard, SCORES.table(rows), Counts(len(rows), len(rows)), mark, 0.0)
    monkeypatch.chdir(place.path)
    return place


def capfilt(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_the_documented_signal_works_everywhere(place, tmp_path, monkeypatch, capsys):
    use(monkeypatch, documented(tmp_path / "site", "adding-a-signal.md", "my_signals"), "my_signals")
    assert capfilt("ascii", "--images", "web") == 0
    assert "7 in = 6 kept + 1 dropped (no_value 1)" in capsys.readouterr().out
    assert capfilt("ascii", "--images", "web") == 0
    assert "done before" in capsys.readouterr().out
    rule = ("select", "--images", "web", "--signals", "ascii")
    assert capfilt(*rule, "--require", "ascii_share > 0.9 AND ascii.letters > 8") == 0
    rows = query(place, "SELECT text, keep, reason FROM verdicts").to_pylist()
    assert {row["text"]: row["reason"] for row in rows} == {
        "a red square": "itm_score_at_threshold", "ein grünes Quadrat": "itm_score_at_threshold", "青い四角": "require_false",
        " ": "require_null", "click here": "itm_score_at_threshold", "Click here": "itm_score_at_threshold",
        "click: here!": "no_image",
    }  # fmt: skip
    assert query(place, "SELECT count(*) n FROM pairs").to_pylist() == [{"n": 4}]
    # Its own view, with its meaning in the help; its part in the report, and in the lineage of the rule.
    found = query(
        place, "SELECT min(ascii_share) AS least, sum(letters) AS letters FROM signals.ascii"
    ).to_pylist()
    assert found == [{"least": 0.0, "letters": 10 + 16 + 4 + 9 + 9 + 9}]
    capsys.readouterr()
    assert capfilt("query") == 0
    assert re.search(
        r"^signals\.ascii: .*\n(  .*\n)*  ascii_share +FLOAT +share of characters",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    write_report(place, tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text()
    assert "signals/ascii" in report
    assert "require_null" in report
    # Another option is another part.
    assert capfilt("ascii", "--images", "web", "--ignore", "#") == 2
    assert "ignore" in capsys.readouterr().err
    steps = recipe.resolve(
        recipe.Recipe(
            version=1,
            stages=[
                {"stage": "ascii", "options": {"images": "web", "out": "again"}},
                {
                    "stage": "select",
                    "options": {
                        "images": "web",
                        "signals": "again",
                        "require": "letters > 4",
                        "out": "words",
                    },
                },
            ],
        ),
        [],
    )
    done = [summary.counts.kept for _, summary in recipe.run_recipe("r", steps, place, "inline", quiet=True)]
    assert done == [6, 4, 4]
    capsys.readouterr()
    assert capfilt("ascii", "--help") == 0
    assert "--ignore" in capsys.readouterr().out
    assert capfilt("--help") == 0
    assert re.search(r"^ +ascii +A stage of the package my_signals", capsys.readouterr().out, re.MULTILINE)


def test_the_documented_stage_works(place, tmp_path, monkeypatch, capsys):
    use(monkeypatch, documented(tmp_path / "site", "adding-a-stage.md", "my_stage"), "my_stage")
    assert capfilt("repeats", "--images", "web") == 0
    assert "7 in = 7 kept" in capsys.readouterr().out
    before = query(place, "SELECT * FROM signals.repeats").to_pylist()
    assert sorted(row["repeats"] for row in before) == [1, 1, 1, 1, 1, 2, 2]
    part = place.part("signals", "repeats")
    (part.path / "00001.parquet").unlink()
    (part.record / "00001.manifest.json").unlink()
    assert capfilt("repeats", "--images", "web") == 0
    assert query(place, "SELECT * FROM signals.repeats").to_pylist() == before
    assert capfilt("repeats", "--images", "web", "--case", "--out", "exact") == 0
    both = (
        "--signals",
        "repeats",
        "--signals",
        "exact",
        "--require",
        "repeats.repeats > 1 AND exact.repeats = 1",
    )
    assert capfilt("select", "--images", "web", *both) == 0
    kept = query(place, "SELECT text FROM verdicts WHERE keep ORDER BY text")["text"].to_pylist()
    assert kept == ["Click here", "click here"]


PICTURES = '''
from dataclasses import dataclass
from capfilt.stages.signal import Signal, TextSignal
from capfilt.stages.command import StageCommand
from capfilt.options import Checked, option

@dataclass(frozen=True)
class Bytes(Signal):
    """Measure how many bytes a picture has."""
    name = "bytes"
    columns = {"size": ("int64", "bytes of the picture"), "wide": ("bool", "whether it is wider than high")}
    reads = ("image", "width", "height")
    def measure(self, rows):
        return [{"size": len(row["image"]["bytes"]), "wide": row["width"] > row["height"]} for row in rows]

BYTES = Bytes.command()

class Few(Bytes):
    def measure(self, rows): return [None]
class Other(Bytes):
    def measure(self, rows): return [{"sise": 1} for row in rows]
class Text(Bytes):
    def measure(self, rows): return [{"size": "many"} for row in rows]
class Generated(Bytes):
    def measure(self, rows): return (None for row in rows)
FEW, OTHER, TEXT, GENERATED = (kind.command() for kind in (Few, Other, Text, Generated))

class Unmeasured(Signal):
    name, columns = "unmeasured", {}
def unmeasured(): return Unmeasured.command()
class Nameless(Bytes):
    columns = {"text_id": ("string", "taken")}
TAKEN = Nameless.command()
class Odd(Bytes):
    columns = {"size": ("whole number", "no type")}
ODD = Odd.command()

class Half:
    pass
from capfilt.stages.base import ShardStage
class Bare(ShardStage):
    name = "bare"
class Without(ShardStage):
    name, version = "without", 1
    def __init__(self, *given): pass
    identity = shards = process = lambda self, *given: {}
@dataclass(frozen=True)
class Plain:
    size: int = 1
def record(name, path, options=Checked): return StageCommand((name,), options, (path,), ())
@dataclass(frozen=True)
class Nothing(Checked):
    """None."""
HALF, BARE = record("half", "pictures:Half", Nothing), record("bare", "pictures:Bare", Nothing)
WITHOUT, GONE = record("without", "pictures:Without", Nothing), record("gone", "pictures:Gone", Nothing)
PLAIN, ELSE = record("plain", "pictures:Half", Plain), record("other", "pictures:Half", Nothing)
NUMBER = 3
'''


@pytest.fixture
def pictures(place, tmp_path, monkeypatch):
    names = {
        "bytes": "pictures:BYTES", "few": "pictures:FEW", "half": "pictures:HALF", "bare": "pictures:BARE",
        "without": "pictures:WITHOUT", "gone": "pictures:GONE", "plain": "pictures:PLAIN", "else": "pictures:ELSE",
        "number": "pictures:NUMBER", "absent": "pictures:ABSENT", "broken": "broken:X", "select": "pictures:BYTES",
    }  # fmt: skip
    site = install(tmp_path / "site", "pictures", PICTURES, {GROUP: names})
    (site / "broken.py").write_text("import a_package_that_is_not_there\n")
    use(monkeypatch, site, "pictures", "broken")
    return place


def test_a_signal_of_pictures_sees_pictures(pictures):
    assert capfilt("bytes", "--images", "web") == 0
    rows = query(
        pictures,
        "SELECT size, octet_length(image.bytes) AS wanted, wide FROM signals.bytes JOIN raw.images USING (image_id)",
    ).to_pylist()
    assert len(rows) == 7
    assert all(row["size"] == row["wanted"] for row in rows)
    assert [row["wide"] for row in rows].count(None) == 1
    counts = pictures.part("signals", "bytes").counts()
    assert (counts.rows_in, counts.kept, counts.dropped) == (7, 6, {"no_image": 1})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half", ["pictures:Half", "ShardStage"]),
        ("bare", ["pictures:Bare", "no identity, process, shards"]),
        ("without", ["pictures:Without", "no output, contract"]),
        ("gone", ["pictures:Gone", "cannot be imported"]),
        ("plain", ["pictures:PLAIN", "'size'"]),
        ("else", ["pictures:ELSE", "StageCommand"]),
        ("number", ["pictures:NUMBER", "StageCommand"]),
        ("absent", ["pictures:ABSENT", "cannot be imported"]),
        ("broken", ["broken:X of the package pictures", "a_package_that_is_not_there"]),
    ],
)
def test_a_stage_that_is_not_whole_is_one_line_with_what_is_missing(pictures, capsys, name, words):
    assert capfilt(name) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("kind", "words"),
    [("Few", "for each of"), ("Other", "size, wide"), ("Text", "'size' is int64"), ("Generated", "for each of"),
     ("Nameless", "'text_id'"), ("Odd", "whole number")],
)  # fmt: skip
def test_a_signal_that_says_something_else_is_one_line(pictures, kind, words):
    import pictures as package

    from capfilt.errors import RunError
    from capfilt.stages.signal.stage import SignalStage

    with pytest.raises((RunError, UserError), match=words) as caught:
        SignalStage(getattr(package, kind)("web"), pictures).process(0)
    assert "\n" not in str(caught.value)


def test_a_signal_without_a_part_of_itself_is_named(pictures):
    import pictures as package

    with pytest.raises(UserError, match="Unmeasured: has no measure"):
        package.unmeasured()


def test_capfilt_s_own_names_are_not_taken(pictures):
    assert stage_command("select") in STAGES
    assert capfilt("select", "--help") == 0


def test_a_name_that_two_packages_declare_is_refused(pictures, tmp_path):
    install(tmp_path / "site", "others", "", {GROUP: {"bytes": "others:BYTES"}})
    with refused("others:BYTES", "pictures:BYTES"):
        stage_command("bytes")


def test_a_stage_that_nobody_has_is_answered_with_all_there_are(pictures):
    with pytest.raises(UserError, match=r"'byte'.*duplicates.*bytes"):
        stage_command("byte")


@pytest.mark.parametrize("command", STAGES, ids=lambda command: command.name)
def test_every_class_that_a_record_names_is_there(command):
    paths = [*command.stages, *filter(None, [command.instead[1]])]
    for path in paths:
        module, _, name = path.partition(":")
        stage = getattr(importlib.import_module(module), name)
        assert callable(stage.identity), path
    for option in (command.positional, command.without, command.instead[0]):
        assert not option or option in command.options.__dataclass_fields__, option


def test_names_are_unique_and_an_unknown_one_is_told_which_there_are():
    names = [command.name for command in STAGES]
    assert len(names) == len(set(names))
    with pytest.raises(UserError, match=r"'captoin'.*caption.*grade"):
        stage_command("captoin")
