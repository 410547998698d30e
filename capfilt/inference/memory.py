"""A GPU's memory that has run out: what says so, and giving back what is kept for speed.

How large a batch is to begin with is capacity.py's; what is done about one that did not fit, engine.py's.
"""

from __future__ import annotations

import torch

SAID = ("CUDA error: out of memory", "CUDA driver error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How memory that libraries and the driver did not get is told, as a RuntimeError."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the GPU's memory is out.

    Its cause counts: a recording that runs out of memory ends with an error of its own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in SAID):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def give_back() -> None:
    """PyTorch's unused blocks to the driver, where that is possible."""
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        # After some failures it is not; whether there is room is for the next attempt to find.
        return
