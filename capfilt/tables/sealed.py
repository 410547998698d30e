"""Fingerprints of JSON-able values, and small JSON files that tell when any of their bytes changed.

A sealed file is JSON in one fixed spelling with a `digest` of its other fields. A reader that finds another spelling or
another digest refuses the file. What the fields mean is known to the modules that write them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import RunError, UserError


def fingerprint(value: Mapping[str, Any]) -> str:
    """Return 32 hex digits that change when anything in the JSON-able `value` changes; key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def seal(values: Mapping[str, Any]) -> bytes:
    """Return `values` and their digest as JSON text. `values` is JSON-able and has no key `digest`."""
    return json.dumps({**values, "digest": fingerprint(values)}, indent=1, sort_keys=True).encode() + b"\n"


def unseal(data: bytes) -> dict[str, Any]:
    """Return the values that `seal` was given. Raises ValueError where `data` is not exactly what it returned."""
    try:
        values = json.loads(data)
        del values["digest"]
        if seal(values) == data:
            return dict(values)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError("its bytes have changed")


def read_sealed(path: Path, cure: str) -> dict[str, Any] | None:
    """Return the values of a sealed file, or None where there is no file.

    Raises UserError with `cure`, which says what to do, where the file has changed, and RunError where it cannot be read.
    """
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: {error} since capfilt wrote it; {cure}") from error
