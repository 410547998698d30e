"""Features of a frozen encoder, remembered by what they are of: in memory, and where asked for on disk.

A feature's key is a digest of the pixels or ids that the encoder is given. So it serves every part, stage and training that
shows the same picture. Not here: where features are kept between runs (`capfilt.tables.features`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Features = Mapping[bytes, npt.NDArray[np.float16]]


def keys_of(rows: Sequence[Tensor]) -> list[bytes]:
    """A key per tensor: 16 bytes, of its type, shape and contents."""
    arrays = [row.cpu().contiguous().numpy() for row in rows]
    return [
        hashlib.sha256(f"{each.dtype}{each.shape}".encode() + each.tobytes()).digest()[:16] for each in arrays
    ]


def digest(module: nn.Module) -> str:
    """16 hex digits of a module's weights and buffers."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


class Memo:
    """The features that an encoder made.

    Args:
        known: those that were kept, by key.
        keep: called with new ones by key, `every` at a time.
        most: bytes that stay in memory; what comes after is computed and forgotten.

    Attributes:
        computed: how many were computed.
    """

    def __init__(
        self,
        known: Features | None = None,
        keep: Callable[[Features], None] | None = None,
        most: int = 2 << 30,
        every: int = 2048,
    ) -> None:
        self._known: dict[bytes, npt.NDArray[Any]] = dict(known or {})
        self._room = most - sum(each.nbytes for each in self._known.values())
        self._keep, self._every = keep, every
        self._fresh: dict[bytes, npt.NDArray[Any]] = {}
        self.computed = 0

    def of(self, keys: Sequence[bytes], encode: Callable[[list[int]], Tensor]) -> Tensor:
        """float16 [B, ...], the features of these keys, on the CPU; `encode` makes those of the rows that it is told."""
        rows = {key: row for row, key in enumerate(keys) if key not in self._known}
        made: dict[bytes, npt.NDArray[Any]] = {}
        if rows:
            found = encode(list(rows.values())).to("cpu", torch.float16).numpy()
            made = dict(zip(rows, found, strict=True))
            self.computed += len(made)
            for key, feature in made.items():
                if self._room >= feature.nbytes:
                    self._room -= feature.nbytes
                    self._known[key] = self._fresh[key] = feature
            if len(self._fresh) >= self._every:
                self.flush()
        both = [self._known[key] if key in self._known else made[key] for key in keys]
        return torch.from_numpy(np.stack(both))

    def flush(self) -> None:
        """Keep what is new."""
        fresh, self._fresh = self._fresh, {}
        if fresh and self._keep:
            self._keep(fresh)
