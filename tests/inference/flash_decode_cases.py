"""Run by test_decode_attention.py in a process of its own: Triton reads its environment when it is imported.

`interpret`: the kernel against PyTorch, in Triton's interpreter. `compile`: the kernel to machine code for two GPUs.
"""

from __future__ import annotations

import os
import sys

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from capfilt.inference import flash_decode as module
from capfilt.inference.decode_attention import DecodeAttention

# queries, keys, width, stretches: one and many, with a last block that is not full, more stretches than a block's worth.
CASES = [
    (1, 577, 64, 1), (1, 577, 64, 3), (3, 577, 64, 9), (16, 577, 64, 2), (5, 130, 32, 2), (1, 1, 16, 1), (2, 128, 64, 2),
    (1, 65, 128, 1), (4, 10, 64, 1),
]  # fmt: skip


def interpret() -> None:
    torch.manual_seed(0)
    # In bf16 the interpreter's own matrix product is wrong (Triton 3.9).
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        for queries, count, width, parts in CASES:
            query, keys, values = (
                torch.randn(2, 3, rows, width).to(dtype) for rows in (queries, count, count)
            )
            query = 3 * query
            keys = (
                keys.transpose(1, 2).contiguous().transpose(1, 2)
            )  # as a model that keeps tokens together has them
            found = module.flash_decode(query, keys, values, parts)
            plain = F.scaled_dot_product_attention(query.float(), keys.float(), values.float())
            assert found.dtype == dtype
            apart = float((found.float() - plain).abs().max())
            assert apart < limit, (queries, count, width, parts, dtype, apart)
            print(queries, count, width, parts, dtype, apart)
    # The check that a worker makes of it, in whole and in stretches, passes it.
    for parts in (1, 3):
        attend = DecodeAttention(lambda *given, parts=parts: module.flash_decode(*given, parts))
        attend(*(torch.randn(1, 2, rows, 64).half() for rows in (1, 577, 577)))
        assert attend.name == "triton"


def compile() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    floats = dict.fromkeys(("largest", "total"), "*fp32")
    numbers = {"count": "i32", "stretch": "i32", "scale": "fp32"}
    for capability in (80, 90):
        for whole in (True, False):
            fixed = {"queries": 1, "padded": 16, "width": 64, "size": module.BLOCK, "whole": whole}
            types = dict.fromkeys(("query", "keys", "values"), "*bf16") | {
                "out": "*bf16" if whole else "*fp32"
            }
            signature = types | floats | numbers | dict.fromkeys(fixed, "constexpr")
            source = ASTSource(fn=module._attend, signature=signature, constexprs=fixed)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert made.asm["cubin"]
            assert "mma.sync" in made.asm["ptx"] or "wgmma" in made.asm["ptx"], "not on tensor cores"
        fixed = {"queries": 1, "width": 64, "slots": 4}
        signature = {"parts": "*fp32", **floats, "out": "*bf16", "number": "i32"} | dict.fromkeys(
            fixed, "constexpr"
        )
        source = ASTSource(fn=module._join, signature=signature, constexprs=fixed)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


{"interpret": interpret, "compile": compile}[sys.argv[1]]()
