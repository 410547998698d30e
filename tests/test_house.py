"""Would catch: a check of the house that counts nothing, and so lets every deep stage, long file and long help through."""

from __future__ import annotations

import dataclasses

from capfilt.options import option
from capfilt.stages import select
from tests import house


def test_what_is_listed_is_all_that_is_found():
    """As `just check` runs it."""
    assert house.faults(house.deep(), house.DEEP) == []
    assert house.faults(house.long_files(), house.LONG) == []
    assert house.long_helps() == {}


def test_a_deep_stage_is_found_through_files_mixins_and_subscripts(tmp_path):
    folder = tmp_path / "capfilt" / "stages" / "room"
    folder.mkdir(parents=True)
    (folder.parent / "base.py").write_text(
        "class ShardStage: ...\nclass One(ShardStage): ...\nclass Plain: ...\n"
    )
    (folder / "a.py").write_text("class Two(Plain, One[int]): ...\nclass Three(a.Two): ...\n")
    (folder / "b.py").write_text("class Four(Three, Plain): ...\nclass Other(Plain): ...\n")
    found = house.deep(tmp_path)
    assert found == {"Four": "Three < Two < One"}
    assert house.faults(found, {}) == ["Four: Three < Two < One"]
    assert house.faults(found, {"Four": "known"}) == []
    assert house.faults({}, {"Four": "known"}) == ["Four: no longer one; take it off the list"]


def test_a_long_file_is_found_wherever_it_is(tmp_path):
    (tmp_path / "capfilt" / "deep").mkdir(parents=True)
    (tmp_path / "capfilt" / "deep" / "long.py").write_text("x\n" * 501)
    (tmp_path / "capfilt" / "fits.py").write_text("x\n" * 500)
    assert house.long_files(tmp_path) == {"capfilt/deep/long.py": "501 lines"}


def test_a_long_help_is_found_in_options_and_in_other_commands(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Options(select.SelectOptions):
        further: str = option("", "x" * 91)

    known = dict(house.helps())
    assert {"select by", "download workspace", "quickstart size", "export to", "recipe show name"} <= set(
        known
    )
    monkeypatch.setattr(
        "capfilt.stages.registry.STAGES", (dataclasses.replace(select.COMMAND, options=Options),)
    )
    assert list(house.long_helps()) == ["select further"]


def test_lines_of_code_are_neither_words_nor_imports(tmp_path):
    (tmp_path / "capfilt").mkdir()
    words = '"""Words.\n\nMore."""\nimport a\nfrom b import (\n    c,\n)\n\n# why\n'
    code = 'x = 1  # one\n\n\ndef f():\n    """Words."""\n    return (\n        x\n    )\n'
    (tmp_path / "capfilt" / "a.py").write_text(words + code)
    assert house.code_lines(tmp_path) == 5
