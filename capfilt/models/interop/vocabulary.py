"""The vocabulary that travels with a checkpoint in another layout: transformers' tokenizer files, or a `vocab.txt`.

Only tokens are taken from a file: how a text is split is the tokenizer's own (`capfilt.data.tokenizer`), and a file that
says otherwise is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capfilt.data.tokenizer import (
    ADDED,
    CLS,
    DEC,
    ENC,
    FILE_NAME,
    MASK,
    MAX_FILE_BYTES,
    PAD,
    SEP,
    UNK,
    Tokenizer,
)
from capfilt.errors import UserError
from capfilt.models.common.weights import read_json

VOCABULARY = "vocab.txt"
BERT_SIZE = 30522
# bert-base-uncased: the ids its tokenizer and BLIP's code write as numbers.
BERT_IDS = {"pad_id": 0, "unk_id": 100, "cls_id": 101, "sep_id": 102, "mask_id": 103}


def find(directory: Path) -> Path:
    """The file a vocabulary is read from; UserError where there is none."""
    for name in (FILE_NAME, VOCABULARY):
        if (directory / name).is_file():
            return directory / name
    raise UserError(
        f"{directory}: neither {FILE_NAME} nor {VOCABULARY}; put the checkpoint's vocabulary there "
        f"(every published BLIP has bert-base-uncased's {VOCABULARY})"
    )


def read(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint with `vocab_size` word embeddings.

    [DEC] and [ENC] follow a vocabulary that lacks them, as the original code adds them to BERT's. UserError where the
    file is no WordPiece vocabulary of that size or splits texts another way.
    """
    path = find(directory)
    tokenizer = Tokenizer.from_vocab(path) if path.name == VOCABULARY else _from_json(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} tokens with {DEC} and {ENC}, but the model has {vocab_size}; "
            "take the vocabulary that belongs to it"
        )
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    content = read_json(path, MAX_FILE_BYTES)
    model = content.get("model")
    vocab = dict(model["vocab"]) if isinstance(model, dict) and isinstance(model.get("vocab"), dict) else None
    added = content.get("added_tokens") or []
    normalizer = content.get("normalizer") or {}
    if vocab is None or not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece":
        raise UserError(f"{path}: no WordPiece vocabulary; BLIP's text side reads no other")
    # strip_accents null means "with lower-casing", which is BERT's own way.
    uncased = normalizer.get("lowercase") and normalizer.get("strip_accents") in (None, True)
    if normalizer.get("type") != "BertNormalizer" or not uncased:
        raise UserError(
            f"{path}: its normalizer is not uncased BERT's; put an uncased {VOCABULARY} in its place"
        )
    for each in added:
        vocab[each["content"]] = each["id"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise UserError(f"{path}: its ids do not run from 0 without a gap")
    if tuple(tokens[-2:]) != ADDED:
        tokens += ADDED
    try:
        return Tokenizer(tokens)
    except ValueError as error:
        raise UserError(f"{path}: {error}; take the vocabulary that belongs to the model") from None


def tokens_of(tokenizer: Tokenizer) -> list[str]:
    """All tokens, by id."""
    return [tokenizer.token(index) for index in range(tokenizer.vocab_size)]


def is_bert(tokenizer: Tokenizer) -> bool:
    """Whether the ids that the original code writes as numbers mean in this vocabulary what they mean in BERT's."""
    return tokenizer.vocab_size == BERT_SIZE + len(ADDED) and all(
        getattr(tokenizer, name) == index for name, index in BERT_IDS.items()
    )


def write_vocabulary(directory: Path, tokenizer: Tokenizer) -> None:
    """`vocab.txt` without [DEC] and [ENC], which the original code and `read` add."""
    text = "\n".join(tokens_of(tokenizer)[: -len(ADDED)]) + "\n"
    (directory / VOCABULARY).write_text(text, encoding="utf-8", newline="\n")


def write_transformers(directory: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer files that transformers' `BertTokenizer.from_pretrained` opens, [DEC] and [ENC] included."""
    tokenizer.save(directory)
    config: dict[str, Any] = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "bos_token": DEC,
        "pad_token": PAD,
        "unk_token": UNK,
        "cls_token": CLS,
        "sep_token": SEP,
        "mask_token": MASK,
        "extra_special_tokens": [ENC],
        "model_max_length": 512,
        "added_tokens_decoder": {
            str(index): {
                "content": tokenizer.token(index),
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index in (
                tokenizer.pad_id,
                tokenizer.unk_id,
                tokenizer.cls_id,
                tokenizer.sep_id,
                tokenizer.mask_id,
                tokenizer.dec_id,
                tokenizer.enc_id,
            )
        },
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
