"""Which precision "auto" comes to on a device: the one place that decides it, for training, engines, plug-ins and tasks."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether `device` is a GPU that computes in bf16 itself: Ampere or newer, or an AMD one that does.

    Older GPUs (V100, T4) emulate it, slower than fp32; on many processors it is emulated too.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        try:
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        except TypeError:  # releases whose answer never counted emulation have no such argument
            return bool(torch.cuda.is_bf16_supported())


def auto_precision(device: torch.device) -> str:
    """bf16 where `has_bf16`, else fp32."""
    return "bf16" if has_bf16(device) else "fp32"
