"""robots.txt as RFC 9309 has it: which rules are for a crawler, what they say of a path, and how long they are remembered.

Fetching the files is `opener.py`. Written out because the standard library's `urllib.robotparser` takes
the first rule that fits, where the RFC takes the longest, and knows no `*` and `$`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from capfilt.stages.download.remembered import Remembered
from capfilt.stages.download.urls import Fault, Target

MAX_BYTES = 500 * 1024
"""How much of a file is read (RFC 9309, section 2.5, asks for at least so much)."""

MAX_RULES = 10_000
"""How many rules of a file count, the first: 500 KiB can hold 43,000, and real files have hundreds."""

MAX_REMEMBERED = 200_000
"""Rules and origins remembered, all together: some 24 MB."""

ROBOTS_SECONDS = 86_400.0
"""How long a file is remembered (RFC 9309, section 2.4: at most a day)."""


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


class RobotsCache(Remembered[Target, Rules]):
    """The rules of each origin, asked for once."""

    def __init__(self, ask: Callable[[Target], Rules], most: int = MAX_REMEMBERED) -> None:
        super().__init__(ask, most, seconds=ROBOTS_SECONDS, size=lambda rules: 1 + len(rules.rules))

    def rules(self, target: Target, until: float) -> Rules:
        """The rules of the target's origin, waited for until then (time.monotonic). Raises Fault."""
        try:
            return self.get(replace(target, path="/robots.txt"), until)
        except TimeoutError:
            raise Fault("timeout", f"{target.address}: waited for its robots.txt", transient=True) from None


def parse_robots(data: bytes, token: str) -> Rules:
    """The rules in a robots.txt for the crawler called `token`: its own groups, else those for `*`. Never raises."""
    token = token.partition("/")[0].strip().lower()
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
    chosen = (own if named else others)[:MAX_RULES]
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
