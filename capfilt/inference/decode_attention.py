"""Which attention a decode step reads the image with: PyTorch's, or the Triton kernel where that was measured faster here.

Which is faster depends on the GPU, on how many images and texts there are, and on the versions of both; so the first step of
a shape runs both, and the others run the winner.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.text import Layer

MOST_QUERIES = 16
"""Texts of one image for which the kernel is considered: it holds their scores in registers."""

ROUNDS = 10

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernel() -> Attend | None:
    """The Triton kernel, or None where there is no Triton."""
    try:
        from capfilt.inference.flash_decode import flash_decode, stretches
    except ImportError:
        return None
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return flash_decode(
            query, keys, values, stretches(query.shape[0] * query.shape[1], keys.shape[2], processors)
        )

    return attend


def cuda_seconds(work: Callable[[], Tensor]) -> float:
    """What a call takes on the GPU: the median of `ROUNDS`."""
    for _ in range(3):
        work()
    found: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


class DecodeAttention:
    """In place of `F.scaled_dot_product_attention` in cross-attention, without gradients.

    Attributes:
        seconds: per shape, what PyTorch's and the kernel's took.
    """

    def __init__(
        self, attend: Attend, seconds_of: Callable[[Callable[[], Tensor]], float] = cuda_seconds
    ) -> None:
        self.attend = attend
        self.seconds_of = seconds_of
        self.faster: dict[tuple[object, ...], bool] = {}
        self.seconds: dict[tuple[object, ...], tuple[float, float]] = {}
        self.failed = False

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """As `F.scaled_dot_product_attention`."""
        if attn_mask is None and not self.failed and _suits(query, keys):
            shape = (*query.shape, keys.shape[2], query.dtype)
            if shape not in self.faster and not _recording(query):
                self.faster[shape] = self._measured(shape, query, keys, values)
            if self.faster.get(shape):
                return self.attend(query, keys, values)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask, dropout_p=dropout_p)

    def _measured(self, shape: tuple[object, ...], query: Tensor, keys: Tensor, values: Tensor) -> bool:
        plain = F.scaled_dot_product_attention(query, keys, values)
        try:
            made = self.attend(query, keys, values)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Triton raises what its compiler, launcher and the C compiler raise
            return self._give_up(f"cannot be used here ({type(error).__name__}: {error})")
        # Rounding of its inputs' dtype apart, they are one function.
        apart = (made.float() - plain.float()).abs().max() / plain.float().abs().max().clamp_min(1e-6)
        if not float(apart) <= 0.02:
            return self._give_up(f"answers otherwise than PyTorch (by {float(apart):.2g})")
        theirs = self.seconds_of(lambda: F.scaled_dot_product_attention(query, keys, values))
        ours = self.seconds_of(lambda: self.attend(query, keys, values))
        self.seconds[shape] = theirs, ours
        return ours < theirs

    def _give_up(self, why: str) -> bool:
        self.failed = True
        said = f"decoding with PyTorch's attention: the Triton kernel {why}"
        warnings.warn(said.splitlines()[0], RuntimeWarning, stacklevel=2)
        return False


def _suits(query: Tensor, keys: Tensor) -> bool:
    width = query.shape[-1]
    return (
        query.shape[2] <= MOST_QUERIES
        and width >= 16
        and width & (width - 1) == 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and keys.shape[:2] == query.shape[:2]
    )


def _recording(query: Tensor) -> bool:
    """A graph is being captured, where nothing can be timed."""
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


def read_faster(model: nn.Module) -> DecodeAttention | None:
    """From now on the cross-attention of `model`, which is on a GPU and not trained, chooses; None: there is no Triton."""
    attend = kernel()
    if attend is None:
        return None
    chooses = DecodeAttention(attend)
    for module in model.modules():
        if isinstance(module, Layer) and module.crossattention is not None:
            module.crossattention.product = chooses
    return chooses
