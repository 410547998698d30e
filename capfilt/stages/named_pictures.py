"""Which picture of images parts a name or number means, by the pictures' keys: the right one or none.

A name's folders count. Sources and images parts are rarely cut at the same folder, so one path may be the tail of the other
("images/7.jpg" and "7.jpg", "1.png" and "train/55/1.png"); a picture in another folder is another picture, except where a
data set's own names tell its pictures apart wherever they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from capfilt.formats.examples.row import ExampleRow
from capfilt.formats.files import same_name
from capfilt.tables.shards import Part

_COCO = re.compile(r"COCO_\w+_(\d{12})")
_FLAT = re.compile(
    # COCO of 2014 and of 2017; NLVR2 (its README), NLVR (its README).
    r"COCO_\w+_\d{12}|\d{12}|(?:train|dev|test[12]?)-\d+-\d+-img[01]|(?:train|dev|test|hidden)-\d+-\d+-\d"
)
_VISUAL_GENOME = ("VG_100K", "VG_100K_2")
"""The two folders of one data set, whose numbers are all different; BLIP's lists of questions name another."""

Folders = tuple[str, ...]


class NamedPictures:
    """The pictures of `parts`, to be found by name; `named` are all names of the source that they are found for."""

    def __init__(self, parts: Iterable[Part], named: Iterable[str]) -> None:
        self._failed: dict[str, str] = {}
        self._keys: dict[str, set[str]] = {}
        self._files: dict[str, list[tuple[PurePosixPath, str]]] = {}
        self._stems: dict[str, list[tuple[PurePosixPath, str]]] = {}
        self._wanted: dict[str, set[Folders]] = {}
        columns = ("image_id", "key", "status", "failure")
        for row in (row for part in parts for table in part.tables(columns) for row in table.to_pylist()):
            if row["status"] != "success":
                self._failed[row["image_id"]] = row["failure"] or row["status"]
            path = _path(row["key"])
            entry = (path, row["image_id"])
            self._keys.setdefault(path.as_posix(), set()).add(row["image_id"])
            self._files.setdefault(path.name, []).append(entry)
            self._stems.setdefault(path.stem, []).append(entry)
            coco = _COCO.fullmatch(path.stem)
            if coco:
                self._stems.setdefault(f"COCO_*_{coco[1]}", []).append(entry)
        for path in map(_path, named):
            self._wanted.setdefault(path.stem, set()).add(path.parts[:-1])

    def find(self, row: ExampleRow) -> tuple[list[str], str]:
        """(image ids in order, "" or what is wrong in words)."""
        if not row.images:
            return [], "no picture is named"
        found = []
        for image in row.images:
            number = self._number(image, row.subset) if isinstance(image, int) else self._name(image)
            if number is None:
                return [], f"{image}: no picture, or more than one, is called so in the images given"
            if number in self._failed:
                return [], f"{image}: there is no picture in its row ({self._failed[number]})"
            found.append(number)
        return found, ""

    def _number(self, image: int, subset: str) -> str | None:
        """COCO's file names of 2014, of the subset first, and of 2017; else a picture called by the number alone."""
        for stem in (f"COCO_{subset}_{image:012d}", f"{image:012d}", f"COCO_*_{image:012d}", str(image)):
            found = {number for _, number in self._stems.get(stem, ())}
            if len(found) == 1:
                return found.pop()
        return None

    def _name(self, image: str) -> str | None:
        """By the key; else by what it may stand for with its suffix; else without (".png" for ".jpg", or none)."""
        path = _path(image)
        exact = self._keys.get(path.as_posix(), set())
        if len(exact) == 1:
            return next(iter(exact))
        for entries in (self._files.get(path.name, ()), self._stems.get(path.stem, ())):
            found = {number for key, number in entries if self._means(path, key)}
            if found:
                return found.pop() if len(found) == 1 else None
        return None

    def _means(self, path: PurePosixPath, key: PurePosixPath) -> bool:
        """Whether a name's folders allow that it means a key of the same file name."""
        if _FLAT.fullmatch(key.stem) or key.parent.name in _VISUAL_GENOME:
            return True
        mine, theirs = path.parts[:-1], key.parts[:-1]
        if not _tail(mine, theirs):
            return False
        # Where the source has such a name in several folders, a key with less folders could be either.
        rivals = (other for other in self._wanted.get(path.stem, ()) if _tail(other, theirs))
        return len(theirs) >= len(mine) or all(_tail(mine, other) for other in rivals)


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(same_name(name))


def _tail(one: Folders, other: Folders) -> bool:
    """Whether one of two paths' folders end the other's."""
    shared = min(len(one), len(other))
    return not shared or one[-shared:] == other[-shared:]
