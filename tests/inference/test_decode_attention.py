"""Catches: a kernel that leaves out keys, mixes up heads or stretches, or does not compile; one that is used though it is
slower, wrong, or broken; a masked or long attention that is given to it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from capfilt.inference.captioner import Captioner
from capfilt.inference.decode_attention import DecodeAttention
from capfilt.models.text import Layer

CASES = Path(__file__).with_name("flash_decode_cases.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@needs_triton
@pytest.mark.parametrize("what", ["interpret", "compile"])
def test_the_kernel_is_pytorchs_attention_and_compiles_for_gpus(what, tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, CASES, what],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_keys_are_divided_where_heads_do_not_fill_the_gpu():
    from capfilt.inference.flash_decode import stretches

    assert stretches(64 * 12, 577, 132) == 1
    assert stretches(12, 577, 132) == 9, "no more than there are blocks"
    assert stretches(100, 577, 132) == 3
    assert stretches(1, 10, 132) == 1


def inputs(queries=1, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, rows, 16, generator=generator).to(dtype) for rows in (queries, 40, 40))


class Kernel:
    """A stand-in: PyTorch's own, `off` by so much, that takes `seconds` where PyTorch takes 1."""

    def __init__(self, seconds=0.5, off=0.0, broken=False):
        self.took, self.off, self.broken = seconds, off, broken
        self.calls = 0
        self.timed = 0

    def __call__(self, query, keys, values):
        if self.broken:
            raise ValueError("no compiler\nsecond line")
        self.calls += 1
        return F.scaled_dot_product_attention(query, keys, values) + self.off

    def seconds(self, work):
        before = self.calls
        work()
        self.timed += 1
        return self.took if self.calls > before else 1.0


def test_the_faster_of_the_two_is_taken_and_measured_once_per_shape():
    fast, slow = Kernel(0.5), Kernel(2.0)
    for kernel in (fast, slow):
        attend = DecodeAttention(kernel, kernel.seconds)
        for seed in range(3):
            query, keys, values = inputs(seed=seed)
            assert torch.equal(
                attend(query, keys, values), F.scaled_dot_product_attention(query, keys, values)
            )
        assert kernel.timed == 2
        assert list(attend.seconds.values()) == [(1.0, kernel.took)]
        attend(*inputs(queries=2))
        assert kernel.timed == 4
    assert fast.calls > slow.calls == 4, "the slow one ran to be measured only"


@pytest.mark.parametrize(
    ("kernel", "why"), [(Kernel(off=0.5), "answers otherwise"), (Kernel(broken=True), "no compiler")]
)
def test_a_kernel_that_fails_or_errs_is_left_with_one_warning(kernel, why):
    attend = DecodeAttention(kernel, kernel.seconds)
    with pytest.warns(RuntimeWarning, match=why) as said:
        found = attend(*inputs())
    assert "\n" not in str(said[0].message)
    assert torch.equal(found, F.scaled_dot_product_attention(*inputs()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*inputs(queries=3))
    assert kernel.timed == 0


def test_masks_long_texts_and_full_precision_are_pytorchs():
    kernel = Kernel()
    attend = DecodeAttention(kernel, kernel.seconds)
    query, keys, values = inputs()
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 30:] = False
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    assert torch.equal(attend(query, keys, values, attn_mask=mask, dropout_p=0.0), expected)
    attend(*inputs(queries=17))
    attend(*inputs(dtype=torch.float32))
    assert kernel.calls == 0


def test_captions_do_not_depend_on_who_reads_the_image(pair, images):
    """Given to a model's cross-attention, decoding goes through it for every layer and writes what it wrote."""
    plain = Captioner(*pair, precision="bf16")
    expected = plain.caption(images, samples=2, seed=3)
    kernel = Kernel()
    attend = DecodeAttention(kernel, kernel.seconds)
    engine = Captioner(*pair, precision="bf16")
    for module in engine.model.modules():
        if isinstance(module, Layer):
            module.crossattention.product = attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capfilt.inference.decode_attention._suits", lambda query, keys: query.shape[2] <= 16)
        assert engine.caption(images, samples=2, seed=3) == expected
    assert kernel.calls > len(engine.model.text_decoder.bert.layers)
    assert all(
        layer.crossattention.product is F.scaled_dot_product_attention
        for layer in plain.model.text_decoder.bert.layers
    )


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_is_pytorchs_attention():
    from capfilt.inference.decode_attention import kernel

    attend = kernel()
    assert attend is not None
    for queries, count, images in [(1, 577, 64), (3, 577, 4), (16, 197, 1), (1, 10, 2)]:
        generator = torch.Generator("cuda").manual_seed(0)
        query, keys, values = (
            torch.randn(images, 12, rows, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
            for rows in (queries, count, count)
        )
        expected = F.scaled_dot_product_attention(query, keys, values)
        torch.testing.assert_close(attend(query, keys, values), expected, atol=0.02, rtol=0.02)
