"""An exponential moving average of the weights under training: steadier to evaluate than the live ones.

Running statistics of batch normalisations are averaged alike, as timm's ModelEmaV2 does: those of the live weights are not
those of the average's activations.

Not here: the momentum towers that make ITC's targets (`capfilt.models.objectives`), which train with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from capfilt.models.common.layers import running
from capfilt.training.distributed import local, split_like


def averaged(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an average is made of, by name: these parameters of the module, and what else moves with them."""
    return {**parameters, **running(module)}


class WeightAverage:
    """fp32 averages of the given tensors (`averaged`), by name, on their devices.

    After update t (from 0): average <- d * average + (1 - d) * live with d = min(decay, (1 + t) / (10 + t)), so that a
    short run's average is not its initialisation (Inception, arXiv 1512.00567, sec. 8 evaluates such an average; the
    ramp is that of TensorFlow's ExponentialMovingAverage with `num_updates`). bf16 weights would lose steps of 1 - d.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.live = dict(live)
        self.decay = decay
        self.tensors = {name: each.detach().float().clone() for name, each in self.live.items()}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Moves the averages towards the live weights; `done` updates were made before."""
        decay = min(self.decay, (1.0 + done) / (10.0 + done))
        live = [local(self.live[name].detach()).float() for name in self.tensors]
        torch._foreach_lerp_([local(each) for each in self.tensors.values()], live, 1.0 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes copies of what `tensors` held when it was saved. KeyError for a missing name."""
        for name, own in self.tensors.items():
            own.copy_(split_like(tensors[name], own))


@contextmanager
def swapped(module: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `module` holds the averages of the named parameters and statistics; afterwards its own again, bit for bit."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    before = {name: own[name].detach().clone() for name in average}
    try:
        with torch.no_grad():
            for name, tensor in average.items():
                own[name].copy_(tensor)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                own[name].copy_(tensor)
