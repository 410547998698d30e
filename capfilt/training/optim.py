"""AdamW and gradient clipping.

Not here: when they are called (`loop.py`), the learning rate (`schedule.py`), how their state survives a crash
(`state.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.training.distributed import local, norm, split_like

DECAY_RULES = ("matrices", "all")


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that ask for gradients, by name, shared ones once. UserError when there is none."""
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError("every parameter is frozen: nothing to train")
    return found


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101) over named parameters, on torch's fused kernel.

    Equal to `torch.optim.AdamW(fused=True)`, whose first use imports torch's compiler: four seconds of CPU time and
    80 MB, in every process that trains a small model for a minute.

    Args:
        parameters: what to train, by name, as `trainable` gives it.
        betas, eps: torch's defaults, which the released BLIP uses.
        weight_decay: 0.05 (BLIP, arXiv 2201.12086, sec. 4.1).
        decay: "matrices" decays what has two dimensions or more, so no bias, LayerNorm or temperature; "all" decays
            everything, temperature included, as the released BLIP does.
        factors: on the learning rate of some parameters, by name; 1 for the others.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        decay: str = "matrices",
        eps: float = 1e-8,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        if decay not in DECAY_RULES:
            raise UserError(f"decay {decay!r}: use one of {', '.join(DECAY_RULES)}")
        self.parameters = dict(parameters)
        self.betas = betas
        self.eps = eps
        self.weight_decay = {
            name: weight_decay if decay == "all" or parameter.dim() >= 2 else 0.0
            for name, parameter in self.parameters.items()
        }
        self.factors = {name: (factors or {}).get(name, 1.0) for name in self.parameters}
        self.moments: dict[str, Moments] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update of every parameter that has a gradient; of a split one, each rank updates its part."""
        kinds = {name: (self.weight_decay[name], self.factors[name]) for name in self.parameters}
        for weight_decay, factor in sorted(set(kinds.values())):
            names = [
                name
                for name, parameter in self.parameters.items()
                if parameter.grad is not None and kinds[name] == (weight_decay, factor)
            ]
            made = {name: self._moments(name) for name in names}
            # A split parameter of few rows may have none of them on this rank.
            names = [name for name in names if local(self.parameters[name]).numel()]
            if not names:
                continue
            moments = [made[name] for name in names]
            steps = [each.step for each in moments]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local(self.parameters[name]) for name in names],
                [local(self._gradient(name)) for name in names],
                [local(each.first) for each in moments],
                [local(each.second) for each in moments],
                [],
                steps,
                lr=factor * learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=weight_decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Drops every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by "NAME.step", "NAME.first" and "NAME.second"; the tensors themselves, not copies."""
        return {
            f"{name}.{kind}": tensor
            for name, moments in self.moments.items()
            for kind, tensor in moments._asdict().items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`: takes copies. KeyError for an unknown name."""
        self.moments = {}
        # In order: where parameters are split over ranks, they do this together.
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            parameter = self.parameters[name]
            step = tensors[f"{name}.step"].to(parameter.device, copy=True)
            first, second = (split_like(tensors[f"{name}.{kind}"], parameter) for kind in ("first", "second"))
            self.moments[name] = Moments(step, first, second)

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None
        return gradient

    def _moments(self, name: str) -> Moments:
        if name not in self.moments:
            parameter = self.parameters[name]
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.moments[name] = Moments(step, torch.zeros_like(parameter), torch.zeros_like(parameter))
        return self.moments[name]


class Moments(NamedTuple):
    """What AdamW remembers of one parameter: how many steps it took, and running means of gradient and its square."""

    step: Tensor
    first: Tensor
    second: Tensor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients in place to a joint L2 norm of at most `max_norm` (0: not at all); returns the norm before.

    A non-finite norm is returned as it is, for the caller to skip the step.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = norm(gradients)
    if max_norm > 0:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(each) for each in gradients], scale)
    return total
