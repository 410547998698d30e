"""Catches an engine that gives up where a smaller batch would do, or that halves its batch for an error of another kind."""

from __future__ import annotations

import pytest
import torch

from capfilt.inference.memory import give_back, out_of_memory


def raised(*errors):
    """The last error, each raised while the one before it was handled."""
    try:
        try:
            raise errors[0]
        except Exception:
            if len(errors) > 1:
                raise errors[1]  # noqa: B904 - the context is what is tested
            raise
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_ran_out_is_known_from_every_library_and_behind_other_errors(error):
    assert out_of_memory(error)
    assert out_of_memory(raised(error, RuntimeError("CUDA error: operation failed due to a previous error")))
    chained = ValueError("the recording failed")
    chained.__cause__ = error
    assert out_of_memory(chained)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        MemoryError("out of memory"),  # the machine's own, which no smaller batch on the GPU mends
        ValueError("CUDA error: out of memory"),
    ],
)
def test_other_errors_are_not(error):
    assert not out_of_memory(error)
    assert not out_of_memory(raised(error, KeyError("x")))


def test_giving_back_is_harmless_where_there_is_nothing_to_give():
    give_back()
