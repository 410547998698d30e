"""The WordPiece vocabulary that travels with a checkpoint in another layout: transformers' tokenizer files, or a `vocab.txt`.

Only tokens are taken from a file: how a text is split is the tokenizer's own (`capfilt.data.tokenizer`), and a file that
says otherwise is refused.
"""

from __future__ import annotations

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
from capfilt.models.common.layouts.contents import NoHome
from capfilt.models.common.weights import read_json

VOCABULARY = "vocab.txt"
BERT_SIZE = 30522
# bert-base-uncased: the ids its tokenizer and BLIP's code write as numbers.
BERT_IDS = {"pad_id": 0, "unk_id": 100, "cls_id": 101, "sep_id": 102, "mask_id": 103}
BERT_TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "pad_token": PAD,
    "unk_token": UNK,
    "cls_token": CLS,
    "sep_token": SEP,
    "mask_token": MASK,
}
"""What transformers' `tokenizer_config.json` says of every such vocabulary."""


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
    tokenizer = Tokenizer.from_published(path) if path.name == VOCABULARY else _from_json(path)
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


def write(directory: Path, tokenizer: Tokenizer) -> None:
    """`vocab.txt` without [DEC] and [ENC], which the original code and `read` add."""
    tokens = [tokenizer.token(index) for index in range(tokenizer.vocab_size - len(ADDED))]
    (directory / VOCABULARY).write_text("\n".join(tokens) + "\n", encoding="utf-8", newline="\n")


def refuse_unlike_bert(vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """NoHome where the ids that the original code writes as numbers do not mean what they mean in BERT's vocabulary.

    Without a tokenizer, the size of one tells.
    """
    same = vocab_size == BERT_SIZE + len(ADDED) and all(
        tokenizer is None or getattr(tokenizer, name) == index for name, index in BERT_IDS.items()
    )
    if not same:
        raise NoHome(
            f"a vocabulary of {vocab_size} tokens that is not bert-base-uncased's has no home in the original layout, "
            "whose code loads BERT's and writes its ids as numbers",
            "--vocab with bert-base-uncased's vocab.txt",
        )
