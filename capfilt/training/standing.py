"""Values that forward passes move beside weights, kept so that a skipped step leaves it as it was: running statistics of batch
normalisations, queues, and whatever else a module holds in buffers or extra state.

Not here: when a step is skipped (`loop.py`), what follows the weights (a module's `after_step`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Standing:
    """A copy of all buffers and of all extra state of `module`, in memory that is taken once."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stateful = [
            each for each in module.modules() if type(each).get_extra_state is not nn.Module.get_extra_state
        ]
        self._buffers: list[Tensor] = []
        self._extra: list[Any] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copies what stands now."""
        own = list(self.module.buffers())
        if not self._buffers:
            self._buffers = [torch.empty_like(each) for each in own]
        if own:
            torch._foreach_copy_(self._buffers, own)
        self._extra = [each.get_extra_state() for each in self.stateful]

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes everything what it was at the last `keep`."""
        own = list(self.module.buffers())
        if own:
            torch._foreach_copy_(own, self._buffers)
        for each, extra in zip(self.stateful, self._extra, strict=True):
            each.set_extra_state(extra)
