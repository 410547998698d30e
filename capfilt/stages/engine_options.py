"""How `caption` and `score` compute: options that both have."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import MACHINE, Checked, option


@dataclass(frozen=True)
class EngineOptions(Checked):
    """How an engine computes."""

    panel = MACHINE

    batch_size: int = option(0, "images per batch; 0: as many as fit")
    precision: str = option(
        "auto",
        "arithmetic of a checkpoint; auto: bf16 on GPUs that have it, else fp32",
        later=True,
        choices=("auto", "fp32", "bf16", "int8", "fp8"),
    )
    compile: bool = option(False, "compile the vision tower for the GPU; takes a minute, once", later=True)
    draft: bool = option(
        False, "let decoders scale large JPEGs: faster, but scores move a little", later=True, rare=True
    )
