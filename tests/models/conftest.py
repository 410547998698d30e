"""Tokenizers of a chosen size, so that tiny random models can be saved and loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer


@pytest.fixture(scope="session")
def tokenizer_of():
    def make(vocab_size: int) -> Tokenizer:
        words = [f"w{index}" for index in range(vocab_size - len(SPECIALS) - len(ADDED))]
        return Tokenizer([*SPECIALS, *words, *ADDED])

    return make


@pytest.fixture(scope="session")
def transformers_twins():
    path = Path(__file__).resolve().parents[1] / "models" / "twins.py"
    spec = importlib.util.spec_from_file_location("transformers_twins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.twins
