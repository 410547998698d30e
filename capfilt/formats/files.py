"""Files of a folder: which are pictures, by content where the name does not tell, and reading them without leaving the folder.

A symbolic link is followed where it stays within the folder. Names are found whichever way they spell accents.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath

from capfilt.data.images import HEAD_BYTES, SUFFIXES, kind_of
from capfilt.errors import UserError

MAX_FILE_BYTES = 256 * 2**20
"""A picture's file above this many bytes is not read: the failure `too_large`."""

MAX_TEXT_BYTES = 10_000_000
"""A picture's text above this many bytes is not read."""


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        pictures: names relative to the folder, in order.
        others: names of the further files, in order.
        left_out: how many of the rest there are, by kind.
    """

    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def walk(root: Path) -> Listing:
    """The files below a folder; a file is a picture where its name or its first bytes say so."""
    found = Listing()
    for directory, folders, files in os.walk(root):
        links = [name for name in folders if Path(directory, name).is_symlink()]
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        found.left_out += Counter({"links to folders": len(links), "hidden": len(hidden)})
        folders[:] = [name for name in folders if name not in {*links, *hidden}]
        for name in files:
            if name.startswith("."):
                continue
            file = Path(directory, name)
            relative = file.relative_to(root).as_posix()
            if name.rpartition(".")[2].lower() in SUFFIXES:
                found.pictures.append(relative)
            elif leads_out(root, file):
                found.left_out["links out of the folder"] += 1
            elif isinstance(head := read_file(file, most=HEAD_BYTES, whole=False), bytes):
                (found.pictures if kind_of(head) else found.others).append(relative)
            else:
                found.left_out["unreadable files"] += 1
    found.pictures.sort()
    found.others.sort()
    return found


def kind_in_words(name: str) -> str:
    """The kind under which a file that is left out is counted: its ending, where that is like others."""
    ending = PurePosixPath(name).suffix.lower()
    return ending if re.fullmatch(r"\.[a-z]\w{0,9}", ending) else "other files"


def images_beside(path: Path) -> Path:
    """The folder of pictures that go with a file: `images` beside it, else the file's own. UserError for a link elsewhere."""
    beside = path.parent / "images"
    if beside.is_dir() and leads_out(path.parent, beside):
        raise UserError(f"{beside}: is a link out of its folder; give --images {beside.resolve()}")
    return beside if beside.is_dir() else path.parent


def safe_join(root: Path, name: str) -> Path | None:
    """`name` within `root`, or None where it leads out of it (absolute, or through `..`)."""
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or parts[0] == "/" or ".." in parts:
        return None
    return root.joinpath(*parts)


def leads_out(root: Path, file: Path) -> bool:
    """Whether symbolic links below `root` take `file` out of it."""
    steps = accumulate(file.parts[len(root.parts) :], os.path.join, initial=os.fspath(root))
    if not any(map(os.path.islink, islice(steps, 1, None))):
        return False
    return not f"{os.path.realpath(file)}/".startswith(f"{os.path.realpath(root).rstrip('/')}/")


def same_name(name: str) -> str:
    """A name in the one spelling by which names are compared (NFC): Macs write accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def is_file(path: Path) -> bool:
    """Whether there is such a file. Unlike Path's own, False also of a name that no system takes."""
    return os.path.isfile(path)  # noqa: PTH113


def find(root: Path, name: str) -> Path | None:
    """The file called `name` in `root`, or where it would be; None where the name or a link leads out of it."""
    file = safe_join(root, name)
    if file is not None and not is_file(file):
        spellings = (unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), name.strip())
        others = (safe_join(root, each) for each in spellings if each != name)
        file = next((other for other in others if other is not None and is_file(other)), file)
    return None if file is None or leads_out(root, file) else file


def read_file(path: Path, most: int = MAX_FILE_BYTES, *, whole: bool = True) -> bytes | tuple[str, str]:
    """The bytes of a file, or (failure, words) where it is missing, no plain file, or above `most` bytes.

    Of a larger file the first `most` bytes where it need not be `whole`.
    """
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not wait for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "file_missing", f"{path.name} is no plain file"
            if whole and status.st_size > most:
                return "too_large", f"{status.st_size} bytes, more than {most}"
            return file.read(most)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return "file_missing", f"{path.name}: {reason}"
