"""Which attention a decode step reads the image with: PyTorch's, or the Triton kernel where few queries read many keys.

By a rule and not by the clock: two workers on cards of one kind must write the same tokens, and rounding tells the two apart.
`benchmarks/engine.py` times both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.inference.memory import out_of_memory
from capfilt.models.common.text import Layer

MOST_QUERIES = 16
"""Texts of one image for which the kernel is considered: it holds their scores in registers."""

LEAST_KEYS = 64
"""As many as the kernel takes at a time; of fewer, most of what it does is filling."""

ROUNDING = 0.02
"""How far bf16's rounding of weights, values and answers may take two kernels apart."""

LEAST_CAPABILITY = (8, 0)  # Ampere: bf16 products on tensor cores

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernel() -> Attend | None:
    """The Triton kernel, or None where there is no Triton, or a GPU that it was not written for."""
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return None
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


class DecodeAttention:
    """In place of `F.scaled_dot_product_attention` in cross-attention, without gradients.

    The kernel's first answer of each kind (queries, keys, their width and dtype, heads up to a power of two) is held against
    PyTorch's, element by element; a kind that it cannot do, or does otherwise, is PyTorch's from then on. That is warned of
    once.

    Attributes:
        sound: per kind that came, whether the kernel does it.
    """

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.sound: dict[tuple[object, ...], bool] = {}

    @property
    def name(self) -> str:
        """Which attention was used for what the kernel is for: "triton", "sdpa" or "triton and sdpa"."""
        found = set(self.sound.values()) or {True}
        return " and ".join(name for name, used in (("triton", True), ("sdpa", False)) if used in found)

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """As `F.scaled_dot_product_attention`."""
        if attn_mask is None and suits(query, keys):
            heads = query.shape[0] * query.shape[1]
            kind = (*query.shape[2:], keys.shape[2], query.dtype, heads.bit_length())
            if kind not in self.sound and not _recording(query):
                self.sound[kind] = self._checked(query, keys, values)
            if self.sound.get(kind):
                return self.attend(query, keys, values)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask, dropout_p=dropout_p)

    def _checked(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        plain = F.scaled_dot_product_attention
        # Rounding is a share of what the weights carry, not of what is left once values of both signs have cancelled.
        carried = plain(query, keys, values.abs()).float()
        if not self._agrees(query, keys, values, ROUNDING * carried.clamp_min(1e-6)):
            return False
        # Where all keys weigh alike, each is worth 1/keys in every element: half of that tells whether all are read, once.
        generator = torch.Generator(values.device).manual_seed(0)
        signs = torch.empty_like(values).bernoulli_(generator=generator).mul_(2).sub_(1)
        even = torch.zeros_like(query)
        allowed = 0.5 / keys.shape[2] + plain(even, keys, signs).float().abs() * 2**-8
        return self._agrees(even, keys, signs, allowed)

    def _agrees(self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> bool:
        """Whether no element of the kernel's answer is further from PyTorch's than it is `allowed` to be."""
        plain = F.scaled_dot_product_attention(query, keys, values)
        try:
            made = self.attend(query, keys, values)
        except Exception as error:
            if out_of_memory(error):
                raise
            return self._refused(f"cannot be used here ({type(error).__name__}: {error})")
        apart = float(((made.float() - plain.float()).abs() / allowed).max())
        if not apart <= 1.0:
            return self._refused(f"answers otherwise than PyTorch ({apart:.2g} times what rounding explains)")
        return True

    def _refused(self, why: str) -> bool:
        if all(self.sound.values()):
            said = f"decoding with PyTorch's attention: the Triton kernel {why}"
            warnings.warn(said.splitlines()[0], RuntimeWarning, stacklevel=2)
        return False


def suits(query: Tensor, keys: Tensor) -> bool:
    """Whether the kernel is for such a product. Shapes and dtype decide, and nothing that differs between two runs."""
    width = query.shape[-1]
    return (
        query.shape[2] <= MOST_QUERIES
        and keys.shape[2] >= LEAST_KEYS
        and width >= 16
        and width & (width - 1) == 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and keys.shape[:2] == query.shape[:2]
    )


def _recording(query: Tensor) -> bool:
    """A graph is being captured, where nothing can be waited for."""
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


def read_by_kernel(model: nn.Module) -> DecodeAttention | None:
    """From now on the cross-attention of `model`, which is on the current GPU and not trained, goes by the rule above; None:
    there is no kernel here.
    """
    attend = kernel()
    if attend is None:
        return None
    chooses = DecodeAttention(attend)
    for module in model.modules():
        if isinstance(module, Layer) and module.crossattention is not None:
            module.crossattention.product = chooses
    return chooses
