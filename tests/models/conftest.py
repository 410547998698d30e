"""Tokenizers of a chosen size, so that tiny random models can be saved and loaded."""

from __future__ import annotations

import pytest

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer


@pytest.fixture(scope="session")
def tokenizer_of():
    def make(vocab_size: int) -> Tokenizer:
        words = [f"w{index}" for index in range(vocab_size - len(SPECIALS) - len(ADDED))]
        return Tokenizer([*SPECIALS, *words, *ADDED])

    return make
