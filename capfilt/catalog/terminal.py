"""Tables in the terminal, laid out by rich, with every cell made visible. The cells are the caller's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from capfilt.tables.visible import visible

_GAP = 2
_NARROWEST_CELL = 8


def write_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    out: TextIO,
    width: int = 0,
) -> None:
    """Write a table with a line per row to `out`.

    Args:
        header: the columns' names.
        rows: their cells, one line each.
        right: which columns stand to the right.
        out: a text stream.
        width: the widest columns are cut until the table has so many terminal columns, but none below 8; 0: nothing
            is cut.
    """
    header, rows = [*map(visible, header)], [[*map(visible, row)] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for name, to_the_right in zip(header, right, strict=True):
        table.add_column(Group(_line(name), Rule()), justify="right" if to_the_right else "left")
    for row in rows:
        table.add_row(*map(_line, row))
    sizes = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    least = sum(min(size, _NARROWEST_CELL) if width else size for size in sizes) + _GAP * (len(sizes) - 1)
    drawn = io.StringIO()
    Console(file=drawn, width=max(width, least), color_system=None).print(table)
    out.writelines(f"{line.rstrip()}\n" for line in drawn.getvalue().splitlines())


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
