"""Fingerprints of JSON-able values, and files that carry their own digest: any changed byte of such a file is found.

A sealed file has a JSON field `sealed`, near its beginning, with the SHA-256 of the file as it is with zeros in that field's
place. JSON records are sealed in memory; checkpoints' and states' files where they lie. The modules that write a file know
the meaning of its fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import RunError, UserError, naming

SEAL, UNSEALED = "sealed", "0" * 64
"""The field for the digest, and its value while the digest is taken."""
_SEALED = re.compile(rf'"{SEAL}": ?"([0-9a-f]{{64}})"'.encode())
_HEAD = 16 * 2**20
"""Bytes: the field must lie this near to the file's beginning."""


def fingerprint(value: Mapping[str, Any]) -> str:
    """Return 32 hex digits that change when anything in the JSON-able `value` changes; key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def seal(values: Mapping[str, Any]) -> bytes:
    """Return `values`, which are JSON-able and have no key `sealed`, as sealed JSON text."""
    data: bytes = json.dumps({**values, SEAL: UNSEALED}, indent=1, sort_keys=True).encode() + b"\n"
    place = _SEALED.search(data)
    assert place is not None
    digest: str = _digest(data, place).hexdigest()
    return data[: place.start(1)] + digest.encode() + data[place.end(1) :]


def unseal(data: bytes) -> dict[str, Any]:
    """Return the values that `seal` was given. Raises ValueError where `data` is not exactly its text of them."""
    place = _SEALED.search(data)
    if place is None or place[1].decode() != _digest(data, place).hexdigest():
        raise ValueError("its bytes have changed")
    try:
        values = json.loads(data)
        del values[SEAL]
        return dict(values)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is not as it was written") from error


def read_sealed(path: Path, cure: str) -> dict[str, Any] | None:
    """Return the values of a sealed JSON file, or None where there is no file.

    Raises UserError with `cure`, which says what to do, where the file has changed, and RunError where it cannot be read.
    """
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; {cure}") from error


def seal_file(path: Path) -> None:
    """Put the digest of a file that has UNSEALED in its field SEAL into that field. Raises ValueError where it has none."""
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
    """Where the digest stands in a file, and the digest that belongs there."""
    with naming(path), path.open("rb") as file:
        head = file.read(_HEAD)
        place = _SEALED.search(head)
        if place is None:
            return None, ""
        total = _digest(head, place)
        while chunk := file.read(2**20):
            total.update(chunk)
    return place, total.hexdigest()


def _digest(data: bytes, place: re.Match[bytes]) -> Any:
    return hashlib.sha256(data[: place.start(1)] + UNSEALED.encode() + data[place.end(1) :])
