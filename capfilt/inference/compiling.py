"""The vision tower through torch.compile, whose work is kept on disk, so that only the first start waits for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from capfilt.models.blip import Blip

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiled_tower(model: Blip) -> Callable[[Tensor], Tensor]:
    """`model.encode_image`, compiled when it is first called; the model itself is left as it is.

    PyTorch keeps what it compiled in a temporary directory; unless the environment says where, it is ~/.cache/capfilt here.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(CACHE, str(cache / "capfilt" / "torchinductor"))
    compiled: Callable[[Tensor], Tensor] = torch.compile(model.visual_encoder)
    return compiled
