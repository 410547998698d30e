"""Decode steps recorded once and replayed: on a GPU a step is some hundred small kernels, and starting them takes longer.

A recording has fixed shapes and addresses, so there is one per step of a batch shape, over buffers that belong to it. Which
step comes when, and what is said, is `decoding.py`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from capfilt.inference.decoding import Writes
from capfilt.models.layers import Pair
from capfilt.models.text import SelfCache

Recorded = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Recorded]
"""From a computation on fixed buffers to one that repeats it; `run_again` is the plain twin of `cuda_graph`."""

SHAPES = 2
"""Batch shapes whose recordings are kept: the full one, and the last of a shard."""


def run_again(compute: Callable[[], Tensor]) -> Recorded:
    """No recording at all."""
    return compute


def cuda_graph(compute: Callable[[], Tensor]) -> Recorded:
    """A CUDA graph of `compute`; what it returns is overwritten by the next replay."""
    # Off the default stream first, as recording wants it: libraries make their plans and workspaces there.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class _Shape:
    """The buffers and recordings of one batch shape."""

    def __init__(self, cache: SelfCache, cross: Sequence[Pair]) -> None:
        self.cache = cache
        self.cross = [(keys.clone(), values.clone()) for keys, values in cross]
        self.ids: dict[int, Tensor] = {}
        self.steps: dict[int, Recorded] = {}


class RecordedWriter:
    """`model` as the decoding loops want it (one way per image), its single-token steps recorded by `record`.

    Where recording fails, it goes on without, after one warning.
    """

    def __init__(self, model: Writes, record: Record = cuda_graph) -> None:
        self.model = model
        self.record = record
        self.shapes: dict[tuple[object, ...], _Shape] = {}
        self.failed = False
        self._now: _Shape | None = None

    def forget(self) -> None:
        """Lets go of all buffers and recordings."""
        self.shapes.clear()
        self._now = None

    def new_cache(self, ways: int, max_length: int, cross: Sequence[Pair]) -> SelfCache:
        """The shape's own cache, emptied; its cross-attention keys and values become `cross`."""
        self._now = None
        if self.failed or ways != 1:
            # With several, a step's mask is made anew each time, which a recording could not do.
            return self.model.new_cache(ways, max_length, cross)
        key = (tuple(cross[0][0].shape), cross[0][0].dtype, max_length)
        shape = self.shapes.pop(key, None)
        if shape is None:
            shape = _Shape(self.model.new_cache(ways, max_length, cross), cross)
        else:
            shape.cache.restart()
            for (keys, values), (new_keys, new_values) in zip(shape.cross, cross, strict=True):
                keys.copy_(new_keys)
                values.copy_(new_values)
        self.shapes[key] = shape
        while len(self.shapes) > SHAPES:
            self.shapes.pop(next(iter(self.shapes)))
        self._now = shape
        return shape.cache

    def decode(self, ids: Tensor, cache: SelfCache, cross: Sequence[Pair]) -> Tensor:
        """As the model's own."""
        shape = self._now
        if shape is None or cache is not shape.cache:
            return self.model.decode(ids, cache, cross)
        if self.failed or cache.length == 0 or ids.shape[1] != 1:
            return self.model.decode(ids, cache, shape.cross)
        at = cache.length
        if at not in shape.steps:
            try:
                self._record(shape, at, ids)
            except torch.OutOfMemoryError:
                raise  # for who can make the batch smaller
            except RuntimeError as error:
                self.failed = True
                cache.rewind(at)
                warnings.warn(f"decoding without CUDA graphs: {error}".splitlines()[0], stacklevel=2)
                return self.model.decode(ids, cache, shape.cross)
        shape.ids[at].copy_(ids)
        out = shape.steps[at]()
        cache.rewind(at)
        cache.advance(*ids.shape)
        return out

    def _record(self, shape: _Shape, at: int, ids: Tensor) -> None:
        fixed = shape.ids[at] = ids.clone()

        def compute() -> Tensor:
            shape.cache.rewind(at)
            return self.model.decode(fixed, shape.cache, shape.cross)

        shape.steps[at] = self.record(compute)
