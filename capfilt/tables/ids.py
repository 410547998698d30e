"""Identity of rows (128-bit hashes, the same on every machine, never colliding across datasets) and of files,
which may carry their own digest.

Hashes are BLAKE2b with a 16-byte digest over length-prefixed UTF-8 fields, so that ("ab", "c") and ("a", "bc") differ.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from capfilt.errors import naming


def _hash(*fields: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for field in fields:
        # "surrogatepass": text found on the web may hold lone surrogates, and an id must exist for every text.
        data = field.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def image_id(dataset: str, key: str) -> str:
    """The id of an image: 32 hex digits, unique across datasets (`key` is unique only within its dataset)."""
    return _hash("image", dataset, key)


def example_id(dataset: str, key: str) -> str:
    """The id of an example: 32 hex digits, unique across datasets (`key` is unique only within its dataset)."""
    return _hash("example", dataset, key)


def text_id(image: str, source: str, text: str, generator: str, sample_index: int) -> str:
    """The id of a text of the image with id `image`: 32 hex digits.

    `source` is "web", "human" or "synthetic"; `generator` is the captions part that made the text, "" for found texts;
    `sample_index` is the text's place among its siblings, so that equal texts of one image keep ids of their own.
    """
    return _hash("text", image, source, text, generator, str(sample_index))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SEAL, UNSEALED = "sealed", "0" * 64
"""A JSON object's field for the digest of the file that it is in, and what stands there while the digest is taken."""
_SEALED = re.compile(rf'"{SEAL}": ?"([0-9a-f]{{64}})"'.encode())
_HEAD = 16 * 2**20
"""Bytes: the field must lie this near to the file's beginning."""


def seal(path: Path) -> None:
    """Puts the SHA-256 of a file that has UNSEALED in its field SEAL into that field. ValueError where it has none."""
    place, digest = _sealing(path)
    if place is None:
        raise ValueError(f"{path}: no field {SEAL!r} to hold the digest")
    with naming(path), path.open("r+b") as file:
        file.seek(place.start(1))
        file.write(digest.encode())


def intact(path: Path) -> bool | None:
    """Whether a sealed file has the bytes that it was sealed with, all of them; None where it has no seal."""
    place, digest = _sealing(path)
    return None if place is None else place[1].decode() == digest


def _sealing(path: Path) -> tuple[re.Match[bytes] | None, str]:
    """Where the digest stands, and the one that should: of the file with UNSEALED in its place."""
    with naming(path), path.open("rb") as file:
        head = file.read(_HEAD)
        place = _SEALED.search(head)
        total = hashlib.sha256()
        if place is not None:
            total.update(head[: place.start(1)] + UNSEALED.encode() + head[place.end(1) :])
            while chunk := file.read(2**20):
                total.update(chunk)
    return place, total.hexdigest()
