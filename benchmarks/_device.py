"""What several benchmarks measure and compare with: seconds on a device, its matmul rate, transformers' BLIP."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import _form  # noqa: F401 - a checkout that is not installed is found by it
import torch

from capfilt.models.blip.layouts import TRANSFORMERS
from capfilt.models.blip.model import Blip, BlipConfig


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain matrix product here: the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    one = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(timed(lambda: one @ one, device) for _ in range(10))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_seconds(work: Callable[[], object]) -> float:
    """What a call takes on the GPU, without what starting it takes: the median of 10."""
    for _ in range(3):
        work()
    found: list[float] = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def transformers_config(config: BlipConfig, sep_id: int) -> Any:
    """transformers' config of the same shape."""
    import transformers

    text, vision = config.text, config.vision
    sizes = {
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.depth,
        "intermediate_size": text.hidden,
    }
    return transformers.BlipConfig(
        text_config={
            "vocab_size": text.vocab_size, "hidden_size": text.width, "encoder_hidden_size": vision.width, **sizes,
            "max_position_embeddings": text.max_positions, "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout, "bos_token_id": text.dec_id, "sep_token_id": sep_id,
            "eos_token_id": sep_id, "pad_token_id": 0, "is_decoder": True, "label_smoothing": 0.1,
        },
        vision_config={
            "hidden_size": vision.width, "intermediate_size": vision.hidden, "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads, "image_size": vision.image_size, "patch_size": vision.patch_size,
            "layer_norm_eps": 1e-6,
        },
        image_text_hidden_size=config.embed_dim,
    )  # fmt: skip


def twins(model: Blip, sep_id: int) -> tuple[Any, Any]:
    """transformers' captioner and retrieval model with the weights of `model`, in training mode."""
    import transformers

    config = transformers_config(model.config, sep_id)
    made = {
        "captioner": transformers.BlipForConditionalGeneration(config),
        "filter": transformers.BlipForImageTextRetrieval(config),
    }
    own = model.state_dict()
    for name, twin in made.items():
        state = TRANSFORMERS.given(dataclasses.replace(model.config, half=name), own)
        missing = twin.load_state_dict(state, strict=False).missing_keys
        # What is left is tied to what was loaded.
        assert all("predictions.decoder" in each for each in missing), missing
        twin.tie_weights()
    return made["captioner"], made["filter"]
