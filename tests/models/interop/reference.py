"""Tiny random models of transformers' BLIP classes, saved by transformers itself, and the original repository's files."""

from __future__ import annotations

from pathlib import Path

import torch

from capfilt.data.tokenizer import SPECIALS

VOCAB, SIDE, PATCH, DEPTH = 30, 24, 8, 2
SEP_BIAS = 2.5  # so that random texts end at different lengths
SEP, DEC, ENC = 3, VOCAB - 2, VOCAB - 1
WORDS = [f"w{index}" for index in range(VOCAB - len(SPECIALS) - 2)]
CLASSES = {
    "captioner": "BlipForConditionalGeneration",
    "filter": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
}


def config(kind: str, **changes):
    """A config of the class; every width, depth and number of heads is another, so that none can stand for another."""
    import transformers

    # The answer decoder reads question states through a projection from the vision tower's width.
    width, heads = (24, 2) if kind == "vqa" else (16, 2)
    text = {
        "vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 40, "num_hidden_layers": DEPTH,
        "num_attention_heads": heads, "max_position_embeddings": 20, "bos_token_id": DEC, "sep_token_id": SEP,
        "eos_token_id": SEP, "pad_token_id": 0, "label_smoothing": 0.1,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3,
        "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    return transformers.BlipConfig(
        text_config={**text, **changes.get("text", {})},
        vision_config={**vision, **changes.get("vision", {})},
        image_text_hidden_size=12,
    )


def loud(model, seed: int = 0):
    """Random values of ordinary size in every tensor, biases and LayerNorms too: a misplaced one must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = (
                1.0 if parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
            )
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
            if "predictions" in name and parameter.shape == (VOCAB,):
                parameter[SEP] += SEP_BIAS
    return model.eval()


def saved(directory: Path, kind: str, seed: int = 0, **changes):
    """transformers' model of the kind, which has also been saved into the directory with a vocabulary."""
    import transformers

    model = loud(getattr(transformers, CLASSES[kind])(config(kind, **changes)), seed)
    model.save_pretrained(directory)
    write_vocabulary(directory)
    return model


def write_vocabulary(directory: Path) -> None:
    """`vocab.txt` as published: without [DEC] and [ENC]."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join([*SPECIALS, *WORDS]) + "\n")


def pictures(count: int, seed: int = 1) -> torch.Tensor:
    """Normalised floats [count, 3, SIDE, SIDE]."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def texts(start: int, lengths: list[int], seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of random texts that begin with `start`, end with [SEP] and are padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(len(SPECIALS), DEC, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = start, SEP
        mask[row, :length] = True
    return ids, mask
