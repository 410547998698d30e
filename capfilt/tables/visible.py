"""Texts from the web made safe to show: what a terminal or a browser would obey becomes something to read.

Lines for people leave through `say`; tables and pages, which lay out their own lines, use `visible` for each cell.
"""

from __future__ import annotations

import re
import sys

_UNPRINTABLE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0 and C1 controls: NUL, escape sequences, carriage returns
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction marks, embeddings, overrides, isolates
    "\u2028\u2029"  # line and paragraph separators
    "\ufeff\ufff9-\ufffb"  # byte order mark, annotations
    "\ud800-\udfff"  # lone surrogates, which UTF-8 cannot say
    "\U000e0000-\U000e007f"  # tags: text nobody sees
    "]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str) -> str:
    r"""`text` with every control, direction and invisible character written as an escape (`\n`, `\u202e`)."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def say(*lines: str, err: bool = False) -> None:
    """Print lines for people, each made visible, to standard output or standard error."""
    print(*map(visible, lines), sep="\n", file=sys.stderr if err else sys.stdout, flush=True)


def _escape(character: str) -> str:
    code = ord(character)
    return _SHORT.get(character) or (f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}")


def visible_json(text: str) -> str:
    r"""JSON text with the same characters as JSON escapes, so that it means the same and a terminal obeys nothing.

    `text` is one line: newlines between JSON's own tokens would become escapes too.
    """
    return _UNPRINTABLE.sub(lambda match: _json_escape(match[0]), text)


def _json_escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def shortened(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, an ellipsis standing for the rest."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)].rstrip() + "…"
