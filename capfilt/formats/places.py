"""Where a file lies, on a disk or behind an fsspec URL (s3://, gs://, hf://, https://, ...), and its bytes, decompressed.

`records.py` says what the bytes mean.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from capfilt.errors import UserError, naming
from capfilt.tables.workspace import expanded

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip",
}  # fmt: skip
"""The bytes that a compressed file begins with."""

_ENDINGS = frozenset({".gz", ".zst", ".bz2", ".lz4", ".xz", ".zip"})


@dataclass(frozen=True)
class Place:
    """One file: opened, read and hashed the same way wherever it lies. Picklable."""

    name: str

    @property
    def remote(self) -> bool:
        return "://" in self.name

    @property
    def suffix(self) -> str:
        """`.tsv` of `s3://bucket/urls.tsv` and of `urls.TSV.gz`, in lower case."""
        path = PurePosixPath((self.name.partition("?")[0] if self.remote else self.name).lower())
        return (path.with_suffix("") if path.suffix in _ENDINGS else path).suffix

    def __str__(self) -> str:
        return self.name

    def open(self) -> io.BufferedReader:
        """The bytes as they lie there, seekable. Raises UserError where they cannot be had."""
        try:
            if not self.remote:
                return Path(self.name).open("rb")
            system, path = _file_system(self.name)
            return io.BufferedReader(system.open(path, "rb"))
        except UserError:
            raise
        except Exception as error:
            raise _not_readable(self.name, error) from error

    def stream(self) -> io.BufferedReader:
        """The bytes, decompressed where they begin as gzip, zstd, bzip2 or lz4 do; the name does not matter.

        Seekable only where nothing is compressed. Raises UserError where they cannot be had; reading on, OSError.
        """
        file = self.open()
        head = file.peek(6)
        for magic, codec in _COMPRESSIONS.items():
            if head.startswith(magic) and (codec != "bz2" or head[3:4].isdigit()):
                if codec in ("xz", "zip"):
                    file.close()
                    raise UserError(
                        f"{self.name}: is {codec}, which is not read; decompress it, or use gzip or zstd"
                    )
                return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), codec), 1 << 16)
        return file

    def sha256(self) -> str:
        """SHA-256 of the bytes as they lie there, hex; they are read once, in pieces."""
        with naming(self.name), self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def places(path: str, suffixes: frozenset[str]) -> list[Place]:
    """The files behind `path`, by name: of a folder, those with one of the suffixes, hidden ones and `_...` left out.

    Raises UserError where there is none.
    """
    if "://" not in path:
        file = expanded(path)
        if file.is_dir():
            return _chosen(path, [str(child) for child in file.iterdir() if child.is_file()], suffixes)
        if not file.is_file():
            raise UserError(f"{path}: no such list")
        return [Place(str(file))]
    system, inside = _file_system(path)
    try:
        if system.isdir(inside):
            names = [system.unstrip_protocol(name) for name in system.ls(inside, detail=False)]
            return _chosen(path, names, suffixes)
        if not system.exists(inside):
            raise UserError(f"{path}: no such list")
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
    return UserError(f"{name}: cannot be read ({type(error).__name__}: {first_line(error, '')})")


def first_line(error: Exception, otherwise: str | None = None) -> str:
    """The first line of an exception's message; of one without words its type, or `otherwise`."""
    empty = type(error).__name__ if otherwise is None else otherwise
    return (str(error).strip().splitlines() or [empty])[0][:200]
