"""Decode steps recorded once and replayed: on a GPU a step is some hundred small kernels, and starting them takes longer.

A recording has fixed shapes and addresses: there is one per step of a batch shape, over buffers that belong to the shape. A
batch of fewer images runs in the recording of the full one, whose other rows are then nobody's. Which step comes when, and
what is said, is `decoding.py`'s.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from capfilt.inference.decoding import Writes
from capfilt.inference.memory import out_of_memory
from capfilt.models.common.layers import Pair
from capfilt.models.common.text import SelfCache

Recorded = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Recorded]
"""From a computation on fixed buffers to one that repeats its tensor operations, and none of its Python."""

RECORDING = threading.Lock()
"""Held while a graph is recorded, and by a thread that asks the driver for pinned memory meanwhile: CUDA may refuse either the
other's company, and neither takes longer than some milliseconds."""


class CudaGraphs:
    """Records computations of one shape as CUDA graphs that share their memory: only one is replayed at a time, and what one
    returns must lie in memory of the caller's.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Recorded:
        own = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            # Off the default stream first, as recording wants it: libraries make their plans and workspaces there.
            self.stream.wait_stream(own)
            with torch.cuda.stream(self.stream):
                compute()
            own.wait_stream(self.stream)
            # What other threads do to the GPU is no business of this recording: "global" would fail it for their calls.
            recording = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
            with RECORDING, recording:
                out = compute()
        finally:
            # A recording that fails as it begins or ends leaves the thread on its stream, where nothing may be waited for.
            torch.cuda.set_stream(own)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class _Shape:
    """The buffers and recordings of one batch shape: `ways` texts for each of `images`."""

    def __init__(
        self,
        model: Writes,
        record: Record,
        images: int,
        ways: int,
        max_length: int,
        cross: Sequence[Pair],
        room: Tensor | None,
    ) -> None:
        self.cross = (
            [
                (keys.new_zeros(images, *keys.shape[1:]), values.new_zeros(images, *values.shape[1:]))
                for keys, values in cross
            ]
            if room is None
            else list(zip(room[::2], room[1::2], strict=True))
        )
        self.images = images
        self.cache = model.new_cache(ways, max_length, self.cross)
        self.ids = torch.zeros(images * ways, 1, dtype=torch.int64, device=cross[0][0].device)
        self.logits: Tensor | None = None
        self.record = record
        self.steps: dict[tuple[int, int], Recorded] = {}  # by `SelfCache.place`

    def begin(self, cross: Sequence[Pair]) -> None:
        """Empties the cache; its first images' cross-attention keys and values become `cross`."""
        self.cache.restart()
        for own, given in zip(self.cross, cross, strict=True):
            for buffer, rows in zip(own, given, strict=True):
                if rows.data_ptr() != buffer.data_ptr():
                    buffer[: len(rows)].copy_(rows)


class RecordedWriter:
    """`model` as the decoding loops want it, its single-token steps recorded.

    Where recording fails, it goes on without, after one warning.

    Attributes:
        images: how many a full batch has; fewer are computed as so many.
    """

    def __init__(self, model: Writes, recorder: Callable[[], Record] = CudaGraphs) -> None:
        self.model = model
        self.recorder = recorder
        self.images = 0
        self.failed = False
        self.shape: _Shape | None = None
        self._room: Tensor | None = None  # [2 * layers, images, H, N, d]
        self._key: tuple[object, ...] = ()

    def forget(self) -> None:
        """Lets go of all buffers and recordings."""
        if self.shape is not None:
            # A recording may hold its shape: at once, not when the collector comes.
            self.shape.steps.clear()
        self.shape = self._room = None

    def room(self, made: Tensor) -> Tensor:
        """Where the keys and values `made` [2 * layers, b, H, N, d] of a batch's images are to be written, so that recordings
        read them there: memory that the next batch's overwrite. What a batch was written to is `cross` of `new_cache`.
        """
        if self.failed:
            return made.new_empty(made.shape)
        shape = (len(made), max(made.shape[1], self.images), *made.shape[2:])
        if self._room is None or self._room.shape != shape or self._room.dtype != made.dtype:
            # The old one first, with what was recorded over it.
            self.forget()
            self._room = made.new_zeros(shape)
        return self._room[:, : made.shape[1]]

    def new_cache(self, ways: int, max_length: int, cross: Sequence[Pair]) -> SelfCache:
        """The shape's own cache, emptied; its cross-attention keys and values become `cross`."""
        room = self._room
        if room is not None and room.data_ptr() != cross[0][0].data_ptr():
            room = None
        if self.failed:
            self.forget()
            return self.model.new_cache(ways, max_length, cross)
        first = cross[0][0]
        images = max(len(first), self.images)
        key = (
            images,
            ways,
            max_length,
            first.shape[1:],
            first.dtype,
            None if room is None else room.data_ptr(),
        )
        if self.shape is None or self._key != key or self.shape.cache.kept is not None:
            # The old one first: the two together may not fit.
            self.forget()
            self._room = room
            self.shape = _Shape(self.model, self.recorder(), images, ways, max_length, cross, room)
            self._key = key
        self.shape.begin(cross)
        return self.shape.cache

    def decode(self, ids: Tensor, cache: SelfCache, cross: Sequence[Pair]) -> Tensor:
        """As the model's own. What it returns is overwritten by the next step."""
        shape = self.shape
        if shape is None or cache is not shape.cache or cache.kept is not None:
            return self.model.decode(ids, cache, cross)
        rows, place = len(ids), cache.place
        if cache.length == 0:
            others = ids[:1].expand(shape.images - rows, -1)
            out = self.model.decode(torch.cat([ids, others]), cache, shape.cross)
            if shape.logits is None:
                shape.logits = out.new_empty(len(shape.ids), out.shape[1])
            return out[:rows]
        shape.ids[:rows].copy_(ids)
        if not self.failed and place not in shape.steps:
            try:
                shape.steps[place] = shape.record(lambda: self._step(shape, place))
            except RuntimeError as error:
                if out_of_memory(error):
                    raise  # for who can make the batch smaller
                self.failed = True
                warnings.warn(f"decoding without CUDA graphs: {error}".splitlines()[0], stacklevel=2)
        out = self._step(shape, place) if self.failed else shape.steps[place]()
        # A replay runs no Python: the cache has yet to hear of the step.
        cache.rewind(place)
        cache.advance(len(shape.ids), 1)
        return out[:rows]

    def _step(self, shape: _Shape, place: tuple[int, int]) -> Tensor:
        """The logits after the token at `place`, in the shape's own buffer: recordings may share all other memory."""
        assert shape.logits is not None
        shape.cache.rewind(place)
        return shape.logits.copy_(self.model.decode(shape.ids, shape.cache, shape.cross))
