"""Linear layers in fewer bits: bf16 by conversion, int8 on processors, fp8 on GPUs that have it.

The last two change scores and texts a little. Weights are quantised once, activations whenever they come: in int8 every row by
its own largest value, so that an answer does not depend on its batch; in fp8 the whole tensor by one, so that it does, within
the rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.blip.model import Blip

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # Ada; torch's scaled matmul needs it


class Int8Linear(nn.Module):
    """`linear` with int8 weights and activations and fp32 results, on a processor."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        quantised, scales = to_int8(linear.weight.detach().float())
        self.register_buffer("weight", quantised)
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("bias", _bias(linear, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = to_int8(x.reshape(-1, x.shape[-1]).float())
        # Exact in int32, so that a row's result does not depend on how many others there are.
        out = torch._int_mm(rows, self.weight.t()).float().mul_(scales).mul_(self.scales)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


class Fp8Linear(nn.Module):
    """`linear` with e4m3 weights and activations, accumulated in fp32, bf16 results.

    `plain` computes the same without the GPU's instruction: what is tested where there is none.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, plain: bool = False) -> None:
        super().__init__()
        quantised, scale = to_fp8(linear.weight.detach())
        self.register_buffer("weight", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", _bias(linear, torch.bfloat16))
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_fp8(x.reshape(-1, x.shape[-1]))
        if self.plain:
            out = (rows.float() * scale) @ (self.weight.float() * self.scale).T
            out = (out if self.bias is None else out + self.bias.float()).bfloat16()
        else:
            out = torch._scaled_mm(
                rows, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=torch.bfloat16
            )
        return out.view(*x.shape[:-1], -1)


def _bias(linear: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    found: Tensor | None = getattr(linear, "bias", None)
    return None if found is None else found.detach().to(dtype)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [R, K] as int8 in [-127, 127], and the fp32 [R, 1] that they are to be multiplied by."""
    scales = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scales).round_().to(torch.int8), scales


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as e4m3 (4 bits of exponent, 3 of mantissa) and the fp32 scalar that it is to be multiplied by."""
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(FP8).max
    return (x.float() / scale).to(FP8), scale


def bf16_model(model: Blip) -> Blip:
    """A copy whose blocks hold their linear layers' weights in bf16.

    Autocast alone would convert every weight for every token, or keep converted ones for as long as its context lasts, which
    a recorded step outlives.
    """
    made = copy.deepcopy(model)
    for tower in _towers(made):
        for module in tower.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return made


def int8_model(model: Blip) -> Blip:
    """A copy whose blocks compute their linear layers in int8; embeddings, heads and the vocabulary's stay as they are."""
    if next(model.parameters()).device.type != "cpu":
        raise UserError("precision 'int8' is for processors: use 'bf16' or 'fp8' on a GPU")
    made = copy.deepcopy(model)
    towers = _towers(made)
    if made.config.half != "filter":
        towers.append(made.text_decoder.cls.predictions.transform)
    replace_linears(towers, Int8Linear)
    return made


def fp8_model(model: Blip) -> Blip:
    """`bf16_model` with the vision blocks' linear layers in fp8. UserError on a device that cannot."""
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UserError(
            "precision 'fp8' needs a GPU of compute capability 8.9 or more: use 'bf16', or 'int8' on a processor"
        )
    made = bf16_model(model)
    replace_linears([made.visual_encoder.blocks], Fp8Linear)
    return made


def _towers(model: Blip) -> list[nn.Module]:
    """The blocks that a Blip has: where nearly all of its arithmetic is."""
    towers: list[nn.Module] = [model.visual_encoder.blocks]
    if model.config.half != "captioner":
        towers.append(model.text_encoder.encoder)
    if model.config.half != "filter":
        towers.append(model.text_decoder.bert.encoder)
    return towers


def replace_linears(towers: Sequence[nn.Module], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Puts `make(linear)` in place of every nn.Linear inside, one for all places of a shared one."""
    made: dict[int, nn.Module] = {}
    replaced = []  # kept until the end: an id is its own only while the object lives
    for tower in towers:
        for module in list(tower.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    replaced.append(child)
                    setattr(module, name, made.setdefault(id(child), make(child)))
