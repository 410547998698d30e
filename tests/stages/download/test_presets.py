"""Catches a well-known list read by other columns than it has, and a column that somebody named and that is not taken."""

from __future__ import annotations

import pytest

from capfilt.errors import UserError
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.presets import PRESETS, fitting, layout


@pytest.mark.parametrize("preset", ["", *PRESETS])
def test_a_named_column_wins_and_an_unnamed_one_is_the_layouts(preset):
    found = layout(preset, "url", "caption")
    if preset:
        assert found == PRESETS[preset]
    named = layout(preset, "link", "alt")
    assert (named.url_col, named.caption_col) == ("link", "alt")
    assert (named.header, named.carried, named.license_cols) == (
        found.header,
        found.carried,
        found.license_cols,
    )
    assert layout(preset, "link", "caption").caption_col == found.caption_col


def test_lists_without_a_line_of_names_have_their_columns_in_published_order():
    assert PRESETS["cc3m"].header == ("caption", "url")
    assert PRESETS["cc12m"].header == ("url", "caption")
    assert not PRESETS["laion"].header


@pytest.mark.parametrize("preset", ["LAION", "laion5b", "cc"])
def test_an_unknown_preset_is_refused_with_the_choices(preset):
    with pytest.raises(UserError, match=f"--preset '{preset}'.*{', '.join(PRESETS)}"):
        DownloadOptions(url_list="urls.txt", preset=preset)


@pytest.mark.parametrize(
    ("names", "preset"),
    [
        (["SAMPLE_ID", "URL", "TEXT", "NSFW"], "laion"),
        (["uid", "url", "text"], "datacomp"),
        (["url", "caption"], None),
        (["URL"], None),
        ([], None),
    ],
)
def test_columns_tell_the_preset_that_has_them(names, preset):
    assert fitting(names) == preset
