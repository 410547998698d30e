"""Keys that are unique within a source of many files, each of which may number its pictures anew.

A key is kept where it begins with its file's name, and no other file's keys can begin so: img2dataset's `000120003` in
`00012.tar`, but not `120` in `12.tar` beside `1.tar`. Any other key gets its file's path as prefix. So no two files share
a key, whatever is in them, and no file has to be read to know it.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from heapq import merge
from itertools import islice, pairwise
from pathlib import PurePosixPath

from capfilt.formats.places import Place

RUN = 1_000_000
"""As many keys are sorted in memory."""


class Keys:
    """The keys of files by their names relative to the source."""

    def __init__(self, names: Sequence[str]) -> None:
        stems = {name: _without_ending(name) for name in names}
        begins = sorted(f"{stem}/" for stem in stems.values())
        # `a.tar` beside `a/b.tar`, or beside `a.tar.gz`: only their whole names are no path of one another.
        nested = any(after.startswith(before) for before, after in pairwise(begins))
        self._prefixes = {name: name if nested else stem for name, stem in stems.items()}
        self._beginnings = sorted(
            (beginning, name)
            for name, prefix in self._prefixes.items()
            for beginning in {prefix, PurePosixPath(stems[name]).name}
        )
        self._own = {name: self._unshared(name, PurePosixPath(stem).name) for name, stem in stems.items()}

    def _unshared(self, name: str, stem: str) -> str | None:
        """The stem of a file where no key of another file can begin with it."""
        place = bisect_left(self._beginnings, (stem,))
        while place < len(self._beginnings) and self._beginnings[place][0].startswith(stem):
            if self._beginnings[place][1] != name:
                return None
            place += 1
        return stem

    def tells_file(self, name: str, key: str) -> bool:
        """Whether no other file's key can be like this one of the file `name`."""
        own = self._own[name]
        return own is not None and key.startswith(own)

    def of(self, name: str, key: str) -> str:
        """The key of the whole source for a key of the file `name`."""
        return key if self.tells_file(name, key) else self.prefixed(name, key)

    def prefixed(self, name: str, key: str) -> str:
        """The key behind the path of its file."""
        return f"{self._prefixes[name]}/{key}"


def shared_key(files: Iterable[tuple[str, Iterable[str]]]) -> tuple[str, str, str] | None:
    """The first key in order that two files have, and the names of both; None where each key is in one file only.

    Keys are sorted in runs of RUN, on disk but the last, and merged as a stream, so memory does not grow with them.
    """
    lines = (f"{json.dumps(key)}\t{json.dumps(name)}\n" for name, keys in files for key in keys)
    with ExitStack() as stack:
        runs: list[Iterable[str]] = []
        while run := sorted(islice(lines, RUN)):
            runs.append(run)
            if len(run) == RUN:
                file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))
                file.writelines(run)
                file.seek(0)
                runs[-1] = file
        for before, after in pairwise(merge(*runs)):
            key = after.partition("\t")[0]
            if before != after and before.startswith(f"{key}\t"):
                return json.loads(key), *(json.loads(line.partition("\t")[2]) for line in (before, after))
    return None


def _without_ending(name: str) -> str:
    """`a/00012` for `a/00012.tar.gz`."""
    ending = Place(name).suffix
    return name[: name.lower().rindex(ending)] if ending else name
