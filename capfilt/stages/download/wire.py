"""What the download stage and its child process say to each other: frames of a JSON message and some bytes.

A frame is two lengths (unsigned 32-bit, big-endian), then the JSON, then the bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

_LENGTHS = struct.Struct(">II")

Frame = tuple[dict[str, Any], bytes]


def pack(message: dict[str, Any], payload: bytes = b"") -> tuple[bytes, bytes]:
    """One frame, in two pieces to be written one after the other."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(payload)) + text, payload


def unpack(read: Callable[[int], bytes]) -> Frame:
    """The next frame; `read(n)` returns exactly n bytes or raises."""
    length, size = _LENGTHS.unpack(read(_LENGTHS.size))
    message = json.loads(read(length))
    return message, read(size)
