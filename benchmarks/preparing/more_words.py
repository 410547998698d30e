"""A BLIP with more words in its vocabulary, so that it can be finetuned on texts of another kind than it was trained on.

Words of the given texts that the vocabulary has to spell in pieces become tokens, with new embeddings; all else stays.

    python benchmarks/preparing/more_words.py quickstart/models/filter w/models/start boxes/data.jsonl vqa_easy/data.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import torch

from capfilt.data.cleaning import clean
from capfilt.data.tokenizer import ADDED, Tokenizer
from capfilt.models import build, checkpoint
from capfilt.models.blip.model import Blip

FIELDS = ("sentence", "question", "hypothesis", "answers", "captions")


def words_of(paths: list[Path], least: int) -> list[str]:
    """The words of letters and digits that come `least` times or more, the most frequent first."""
    counts = Counter[str]()
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for field in FIELDS:
                value = record.get(field) or ()
                for text in [value] if isinstance(value, str) else value:
                    counts.update(re.findall(r"[a-z0-9]+", clean(text)))
    return [word for word, count in counts.most_common() if count >= least]


@torch.no_grad()
def grown(model: Blip, tokens: list[str], words: list[str], seed: int = 0) -> tuple[Blip, Tokenizer]:
    """The model with `words` before its last two tokens; rows of those it had are copied."""
    new = [word for word in words if word not in set(tokens)]
    tokenizer = Tokenizer([*tokens[: -len(ADDED)], *new, *ADDED])
    text = dataclasses.replace(model.config.text, vocab_size=tokenizer.vocab_size)
    made = build(dataclasses.replace(model.config, text=text), seed)
    kept = len(tokens) - len(ADDED)
    own = made.state_dict(keep_vars=True)
    for name, old in model.state_dict().items():
        if old.shape == own[name].shape:
            own[name].copy_(old)
        else:
            own[name][:kept] = old[:kept]
            own[name][-len(ADDED) :] = old[-len(ADDED) :]
    return made, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a BLIP to start from")
    parser.add_argument("out", type=Path, help="directory of the checkpoint to write")
    parser.add_argument("texts", type=Path, nargs="+", help="JSON Lines with sentences, questions, answers")
    parser.add_argument("--least", type=int, default=4, help="words that come so often (default 4)")
    options = parser.parse_args()
    model, tokenizer, _ = checkpoint.load(options.checkpoint)
    tokens = list(tokenizer.__reduce__()[1][0])
    made, larger = grown(model, tokens, words_of(options.texts, options.least))
    checkpoint.save(options.out, made, larger, {"of": str(options.checkpoint)})
    print(f"{options.out}: {larger.vocab_size - len(tokens)} words more than {options.checkpoint}")


if __name__ == "__main__":
    main()
