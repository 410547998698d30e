"""BatchNorm in training: whose running statistics move, and when. Only CLIP's ResNet and the trunk have any.

Not here: the trunk's, which never move (`trunk.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)


def training_mode(module: M) -> M:
    """`module.train()`, but for normalisations whose weights are frozen: what does not learn must not drift either."""
    module.train()
    for norm in _norms(module).values():
        learns = [each.requires_grad for each in norm.parameters()]
        if learns and not any(learns):
            norm.eval()
    return module


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The running means and variances that move in training, fp32 [C] each, by their names in the state dict."""
    found: dict[str, Tensor] = {}
    for name, norm in _norms(module).items():
        if norm.training and norm.running_mean is not None and norm.running_var is not None:
            found |= {f"{name}.running_mean": norm.running_mean, f"{name}.running_var": norm.running_var}
    return found


@contextmanager
def standing(layer: object) -> Iterator[None]:
    """Inside, a layer in training is computed as before and its running statistics stand still: for computing it again."""
    norms = [each for each in _norms(layer).values() if each.training] if isinstance(layer, nn.Module) else []
    before = [(each.momentum, each.num_batches_tracked) for each in norms]
    try:
        for norm in norms:
            # Not by taking the statistics away: the same tensors must be kept for the backward pass.
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _norms(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: each for name, each in module.named_modules() if isinstance(each, _BatchNorm)}
