"""How much of a GPU a run uses: the FLOPs of a step, and the peak rates of known GPUs.

Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B): the FLOPs the model needs, recomputed activations not
counted, over what the GPU could have done in that time. Not here: when it is measured (`loop.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch

PEAK_FLOPS: tuple[tuple[str, float | None], ...] = (
    # Dense bf16 matmul with fp32 accumulation, FLOP/s, by a part of the name CUDA gives the device; the first that fits
    # counts. From NVIDIA's data sheets; where they print sparse matrices only, half of that: H200 and H100 SXM 1,979, H200
    # NVL and H100 NVL 1,671, H100 PCIe 1,513, L4 242 TFLOPS. RTX 4090: Ada whitepaper, appendix A. A10G: AWS's G5 guide.
    # None: a namesake with less, and a GPU without bf16 (V100, T4) is not here.
    ("MIG", None),  # a slice of a GPU under the whole one's name
    ("Laptop", None),
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090 D", None),
    ("RTX 4090", 165.2e12),
)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 matmul peak, FLOP/s; None for a CPU and for a GPU that is not in the table."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(name: str) -> float | None:
    """`peak_flops` of a GPU by its name, as `torch.cuda.get_device_name` gives it."""
    words = f" {name} ".replace("-", " ")
    return next((rate for part, rate in PEAK_FLOPS if f" {part} " in words), None)


COUNTED_TEXTS = 8


def flops_per_text(module: nn.Module, batch: Batch, losses: Callable[[Batch], dict[str, Tensor]]) -> float:
    """FLOPs of one text's share of a training step, forward and backward, counted over the first texts of `batch`.

    The module's state, gradients and every random state are as before: it is counted in evaluation mode, where towers
    and queues stand still. Recomputation is switched off while counting, since it is no work of the model's.
    """
    # Imported here: it brings torch's compiler along, which runs without a known GPU should not pay for.
    from torch.utils.flop_counter import FlopCounterMode

    few = batch.split(max(1, len(batch) // COUNTED_TEXTS))[0]
    modes = [(each, each.training) for each in module.modules()]
    recomputed = [each for each in module.modules() if getattr(each, "recompute", False)]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), FlopCounterMode(display=False) as counter:
        try:
            module.eval()
            for each in recomputed:
                each.recompute = False  # type: ignore[assignment]
            losses(few)["loss"].backward()  # type: ignore[no-untyped-call]
        finally:
            for each in recomputed:
                each.recompute = True  # type: ignore[assignment]
            for each, training in modes:
                each.training = training
            for parameter in module.parameters():
                parameter.grad = None
    return float(counter.get_total_flops()) / len(few)
