"""Identity of rows (128-bit hashes, the same on every machine, never colliding across datasets) and of files.

Hashes are BLAKE2b with a 16-byte digest over length-prefixed UTF-8 fields, so that ("ab", "c") and ("a", "bc") differ.
"""

from __future__ import annotations

import hashlib
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


def fold_of(image: str, folds: int) -> int:
    """The fold, from 0, that the image with id `image` is in."""
    return int(image[-8:], 16) % folds


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
