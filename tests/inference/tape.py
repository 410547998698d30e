"""A recorder for a processor that does as a CUDA graph does: it replays tensor operations without any Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Tape(TorchDispatchMode):
    """Inside, operations run and are noted with the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: Python asks for a value")
        # What Python changes later (the list of a foreach operation) is not what was recorded.
        args, kwargs = tree_map_only(Tensor, lambda each: each, (args, kwargs or {}))
        made = function(*args, **kwargs)
        outputs: list[Tensor] = []
        tree_map_only(Tensor, outputs.append, made)
        self.notes.append((function, args, kwargs, outputs))
        return made

    def replay(self) -> None:
        """Every operation again, on the same memory: results go where they went before."""
        for function, args, kwargs, outputs in self.notes:
            again: list[Tensor] = []
            tree_map_only(Tensor, again.append, function(*args, **kwargs))
            for old, new in zip(outputs, again, strict=True):
                # A view, or an operation in place, has the memory already.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(compute):
    """A `Record`: as `CudaGraphs`, which runs a computation once before it captures it."""
    compute()
    tape = Tape()
    with tape:
        out = compute()

    def replay():
        tape.replay()
        return out

    return replay
