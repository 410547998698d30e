"""Where a list of URLs lies: a file, a folder of files, or an fsspec URL of either (s3://, gs://, hf://, https://, ...).

What the files hold is `lists.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from capfilt.errors import UserError, naming


@dataclass(frozen=True)
class Place:
    """One file of a list: opened, read and hashed the same way wherever it lies. Picklable."""

    name: str

    @property
    def remote(self) -> bool:
        return "://" in self.name

    @property
    def suffix(self) -> str:
        """`.tsv` of `s3://bucket/urls.tsv`, in lower case."""
        return PurePosixPath(self.name.partition("?")[0] if self.remote else self.name).suffix.lower()

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        """The bytes, seekable. Raises UserError where they cannot be had."""
        try:
            if not self.remote:
                return Path(self.name).open("rb")
            system, path = _file_system(self.name)
            return cast(BinaryIO, system.open(path, "rb"))
        except UserError:
            raise
        except Exception as error:
            raise _not_readable(self.name, error) from error

    def sha256(self) -> str:
        """SHA-256 of the bytes, hex; they are read once, in pieces."""
        digest = hashlib.sha256()
        with naming(self.name), self.open() as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest()


def places(path: str, suffixes: frozenset[str]) -> list[Place]:
    """The files behind `path`, by name: of a folder, those with one of the suffixes, hidden ones and `_...` left out.

    Raises UserError where there is none.
    """
    if "://" not in path:
        file = Path(path).expanduser()
        if file.is_dir():
            return _chosen(path, [str(child) for child in file.iterdir() if child.is_file()], suffixes)
        if not file.is_file():
            raise UserError(f"{path}: no such list of URLs")
        return [Place(str(file))]
    system, inside = _file_system(path)
    try:
        if system.isdir(inside):
            names = [system.unstrip_protocol(name) for name in system.ls(inside, detail=False)]
            return _chosen(path, names, suffixes)
        if not system.exists(inside):
            raise UserError(f"{path}: no such list of URLs")
    except UserError:
        raise
    except Exception as error:
        raise _not_readable(path, error) from error
    return [Place(path)]


def _chosen(folder: str, names: list[str], suffixes: frozenset[str]) -> list[Place]:
    found = [Place(name) for name in sorted(names) if not PurePosixPath(name).name.startswith((".", "_"))]
    found = [place for place in found if place.suffix in suffixes]
    if not found:
        raise UserError(f"{folder}: no list in this folder ({', '.join(sorted(suffixes))})")
    return found


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: needs fsspec: pip install fsspec") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except Exception as error:
        raise _not_readable(url, error) from error
    return system, path


def _not_readable(name: str, error: Exception) -> UserError:
    # Whatever a file system of fsspec's raises: missing drivers (ImportError), credentials, networks.
    lines = str(error).strip().splitlines()
    return UserError(f"{name}: cannot be read ({type(error).__name__}: {lines[0][:200] if lines else ''})")
