"""A tiny random captioner/filter with sharp enough distributions, and its words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.models import build
from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig

WORDS = [
    "a",
    "picture",
    "of",
    "red",
    "green",
    "dog",
    "cat",
    "ball",
    "on",
    "left",
    "##s",
    "two",
    "the",
    "sits",
]

SEED = 6  # of several, one whose greedy texts differ in words and length


def tiny(words: list[str], scale: float = 3.0, seed: int = 0, **text) -> tuple[Blip, Tokenizer]:
    tokenizer = Tokenizer([*SPECIALS, *words, *ADDED])
    fields = {"max_positions": 48, "dropout": 0.0, "attention_dropout": 0.0, **text}
    config = BlipConfig(
        vision=VisionConfig(16, 8, 16, 1, 2, 32),
        text=TextConfig(tokenizer.vocab_size, 16, 2, 2, 32, **fields),
        embed_dim=8,
    )
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Drawn here, whatever the library's initialisation is: what these tests need is texts of several lengths that
        # depend on the picture.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02 * scale, generator=generator)
        model.text_encoder.embeddings.word_embeddings.weight.mul_(4.0)
        for layer in model.text_encoder.layers:
            layer.crossattention.output.dense.weight.mul_(6.0)
        model.text_decoder.cls.predictions.bias[tokenizer.sep_id] += 1.0
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_model():
    return tiny


@pytest.fixture(scope="session")
def pair() -> tuple[Blip, Tokenizer]:
    return tiny(WORDS, seed=SEED)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(0, 256, (7, 3, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (7, 3, 16, 16), generator=generator)
    return (colours + noise).clamp(0, 255).to(torch.uint8)


def released_beam_search(logits_of, prompt, sep, width, shortest, beams, penalty):
    """One image's texts, best first, by the rule that BLIP's released code had of transformers 4.15, token by token.

    A finished text is kept with log p / (tokens with the prompt, without [SEP]) ** penalty; the `beams` best are kept.
    """
    kept, beams_open = [], [(0.0, [])]
    for step in range(width):
        length, every = len(prompt) + step, []
        for total, text in beams_open:
            logp = logits_of([*prompt, *text]).log_softmax(-1)
            if step < shortest:
                logp[sep] = -torch.inf
            every += [(total + float(each), text, token) for token, each in enumerate(logp)]
        every.sort(key=lambda each: -each[0])
        ranked, beams_open = every[: 2 * beams], []
        for rank, (total, text, token) in enumerate(ranked):
            if token != sep:
                beams_open.append((total, [*text, token]))
            elif rank < beams:
                kept = sorted([*kept, (total / length**penalty, [*text, sep])], reverse=True)[:beams]
            if len(beams_open) == beams:
                break
        if len(kept) == beams and kept[-1][0] >= ranked[0][0] / length**penalty:
            return kept
    whole = (len(prompt) + width) ** penalty
    return sorted([*kept, *((total / whole, text) for total, text in beams_open)], reverse=True)[:beams]


@pytest.fixture(scope="session", name="released_beam_search")
def _released_beam_search():
    return released_beam_search


@pytest.fixture(scope="session")
def transformers_twins():
    path = Path(__file__).resolve().parents[1] / "models" / "twins.py"
    spec = importlib.util.spec_from_file_location("transformers_twins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.twins
