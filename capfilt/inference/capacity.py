"""How many images an engine takes at a time when nobody says: what a batch needs of memory, and how much there is of it."""

from __future__ import annotations

import torch

from capfilt.models.blip.model import BlipConfig

LARGEST = {"cpu": 64, "cuda": 512}
"""More images at a time only wait longer: on a processor from fewer on, on a GPU where transformers was fastest too."""

CPU_BYTES = 2 << 30
"""Per engine, whatever the machine: several workers share one, and the same options should cut the same batches."""

GPU_SHARE = 0.6
"""Of all its memory, so that cards of one kind cut the same batches; the rest is weights, workspaces and fragmentation."""


def image_bytes(config: BlipConfig, ways: int = 1, itemsize: int = 4) -> int:
    """About the bytes that one image more takes at the peak of captioning (`ways` texts of it) or scoring.

    itemsize: bytes of a cross-attention key's number.
    """
    vision, text = config.vision, config.text
    pixels = 3 * 4 * vision.image_size**2
    encode = 4 * vision.tokens * (6 * vision.width + vision.hidden)
    # All layers' cross-attention keys and values, and once more: a recorded step's own, or those of each text.
    cross = 2 * text.depth * 2 * vision.tokens * text.width * itemsize
    # Logits of one step, what they were before the nucleus, and their logarithms; keys and values of what was written.
    words = ways * (3 * 4 * text.vocab_size + 2 * text.depth * 64 * text.width * itemsize)
    return pixels + encode + cross + words


def batch_that_fits(
    config: BlipConfig, device: torch.device, ways: int = 1, itemsize: int = 4, engines: int = 1
) -> int:
    """Images at a time, a power of two: a function of the model, the texts per image and the kind of device alone.

    engines: so many share a GPU, and take turns in the same process.
    """
    memory = CPU_BYTES
    if device.type == "cuda":
        memory = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / engines)
    most = min(LARGEST[device.type], memory // image_bytes(config, ways, itemsize))
    return 1 << (max(1, most).bit_length() - 1)
