"""Would catch: cells that a terminal obeys or that rich reads as markup, numbers out of line, figures cut without need."""

from __future__ import annotations

import io

import pytest

from capfilt.catalog.terminal import write_table


def written(header: list[str], rows: list[list[str]], right: list[bool], width: int = 0) -> list[str]:
    out = io.StringIO()
    write_table(header, rows, right, out, width)
    return out.getvalue().splitlines()


def test_columns_stand_under_their_names() -> None:
    assert written(["name", "n"], [["a", "1"], ["bcdefg", "10"]], [False, True]) == [
        "name     n",
        "──────  ──",
        "a        1",
        "bcdefg  10",
    ]


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\u202eevil", "\x9b2J", "a\tb\rc", "\x85", "\u2028"])
def test_cells_and_names_are_made_visible(text: str) -> None:
    lines = written([text], [[text]], [False])
    assert len(lines) == 3
    assert all(character.isprintable() for character in "".join(lines))


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", ":smile:", "[link=http://x]y[/link]", "\\[b]"])
def test_cells_are_no_markup(text: str) -> None:
    assert written([text], [[text]], [False]) == [text, "─" * len(text), text]


def test_only_the_widest_are_cut_and_only_to_the_width() -> None:
    row = ["x" * 100, "y" * 10, "日" * 30]
    assert written(["a", "b", "c"], [row], [False, False, False])[2].split() == row
    cut = written(["a", "b", "c"], [row], [False, False, False], 50)[2].split()
    assert cut == ["x" * 16 + "…", "y" * 10, "日" * 9 + "…"]
    # With less than about 8 for each, a line is longer than the terminal.
    assert all(
        len(cell) >= 5 for cell in written(["a", "b", "c"], [row], [False, False, False], 5)[2].split()
    )
