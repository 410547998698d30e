"""robots.txt as RFC 9309 has it: which rules are for a crawler, and what they say of a path.

Fetching the files, once per host, is `opener.py`. Written out because the standard library's `urllib.robotparser` takes
the first rule that fits, where the RFC takes the longest, and knows no `*` and `$`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote

MAX_BYTES = 500 * 1024
"""How much of a file is read (RFC 9309, section 2.5, asks for at least so much)."""


@dataclass(frozen=True)
class Rules:
    """The rules for one crawler: (allow, pattern), the longest pattern first and `allow` first among equals."""

    rules: tuple[tuple[bool, str], ...] = ()

    def allows(self, path: str) -> bool:
        """Whether the path, with its query, may be fetched."""
        path = _normal(path)
        if path == "/robots.txt":
            return True
        return next((allow for allow, pattern in self.rules if _fits(pattern, path)), True)


def parse_robots(data: bytes, token: str) -> Rules:
    """The rules in a robots.txt for the crawler called `token`: its own groups, else those for `*`. Never raises."""
    token = token.strip().lower()
    own: list[tuple[bool, str]] = []
    others: list[tuple[bool, str]] = []
    named = False  # whether any group is for the crawler by name
    targets: list[list[tuple[bool, str]]] = []
    heading = False
    for field, value in _lines(data):
        if field == "user-agent":
            if not heading:
                targets = []
            heading = True
            name = value.lower().partition("/")[0].strip()
            if name == "*":
                targets.append(others)
            elif name == token:
                named = True
                targets.append(own)
        elif field in ("allow", "disallow"):
            heading = False
            if value:
                for target in targets:
                    target.append((field == "allow", _normal(value)))
    chosen = own if named else others
    return Rules(tuple(sorted(dict.fromkeys(chosen), key=lambda rule: (-len(rule[1]), not rule[0]))))


def _lines(data: bytes) -> Iterator[tuple[str, str]]:
    text = data[:MAX_BYTES].decode("utf-8", "replace").removeprefix("\ufeff")
    for line in text.replace("\r", "\n").split("\n"):
        field, colon, value = line.partition("#")[0].partition(":")
        if colon:
            yield field.strip().lower(), value.strip()


def _normal(path: str) -> str:
    """The path with the same things percent-encoded, however it was written."""
    return quote(
        unquote(path, errors="surrogateescape"), safe="/*$?&=:@!'()+,;~-._", errors="surrogateescape"
    )


def _fits(pattern: str, path: str) -> bool:
    """Whether the pattern fits the beginning of the path: `*` is anything, a `$` at the end is the end.

    Piece by piece, each at its first place: linear, whatever a hostile pattern looks like.
    """
    end = pattern.endswith("$")
    pieces = (pattern[:-1] if end else pattern).split("*")
    if not path.startswith(pieces[0]):
        return False
    place = len(pieces[0])
    for piece in pieces[1:-1]:
        found = path.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    if len(pieces) == 1:
        return not end or place == len(path)
    last = pieces[-1]
    if end:
        return len(path) - len(last) >= place and path.endswith(last)
    return path.find(last, place) >= 0
