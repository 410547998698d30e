"""Text to ids by a unigram language model of pieces (arXiv 1804.10959): learned, or read from a SentencePiece `.model`.

The vocabularies of XLM-R and mT5 are of this kind. Ids are SentencePiece's own, but for a combining mark after a character
that the model's table changes: the `tokenizers` library drops that mark.
Not here: what all tokenizers share (`tokenizer.py`).
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from capfilt.data.cleaning import AS_FOUND, cleaned
from capfilt.data.tokenizer import Subwords, hashed, read_bytes
from capfilt.errors import UserError

PAD, END, UNK, START, MASK = SPECIALS = ("<pad>", "</s>", "<unk>", "<s>", "<mask>")
SPACE = "▁"
ASIDE = " "
"""Stands before a piece that no text holds: SPACE takes the place of every space, so that nothing in a text matches it."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
CONTEXT = 64  # BEiT-3 (arXiv 2208.10442), released code: texts hold 64 tokens
DIGITS = 6
"""Decimals of a learned score: further ones depend on the order in which the trainer's threads add."""
MAX_ALPHABET = 1000


class UnigramTokenizer(Subwords):
    """Pieces with scores: a text becomes the pieces that are likeliest together, as SentencePiece cuts it.

    Attributes: those of `Subwords`, and `start_id end_id unk_id mask_id`.
    """

    longest = CONTEXT
    most_words = None
    most_bytes = 64 * 2**20  # a vocabulary of 250,000 pieces, as the multilingual ones, has a quarter of that
    published_as = "a SentencePiece .model"

    def __init__(
        self, pieces: Sequence[tuple[str, float]], charsmap: bytes | None = None, cleaning: str = AS_FOUND
    ) -> None:
        """`pieces[i]`, a piece and its score, has id i; one after `ASIDE` is in no text, and SPECIALS must be such.

        charsmap: SentencePiece's table of characters and what they become; None: NFKC. ValueError where that cannot be.
        """
        super().__init__([piece.removeprefix(ASIDE) for piece, _ in pieces], cleaning)
        missing = [special for special in SPECIALS if (ASIDE + special, 0.0) not in pieces]
        if missing:
            raise ValueError(f"token {missing[0]} is missing, or is a piece of texts")
        if not all(math.isfinite(score) for _, score in pieces):
            raise ValueError("a score is no finite number")
        self._scored, self._charsmap = list(pieces), charsmap
        self.pad_id, self.end_id, self.unk_id, self.start_id, self.mask_id = (
            self._vocab[token] for token in SPECIALS
        )
        self.first_id, self.last_id = self.start_id, self.end_id
        self._aside = frozenset(i for i, (piece, _) in enumerate(pieces) if piece.startswith(ASIDE))
        held = [self._vocab.get(each, -1) for each in BYTES]
        self._bytes = held if self._aside.issuperset(held) else []
        self._inner = _pipeline(self._scored, self.unk_id, charsmap)
        given = "".join(f"{piece}\n{score!r}\n" for piece, score in pieces)
        self.fingerprint = hashed(given, repr(charsmap))

    def _made_of(self) -> tuple[list[tuple[str, float]], bytes | None]:
        return self._scored, self._charsmap

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 8000, cleaning: str = AS_FOUND
    ) -> UnigramTokenizer:
        """Learn at most `vocab_size` ids, everything counted, from `texts` after their cleaning.

        The same texts, in any order, give the same vocabulary. Characters beyond a quarter of the vocabulary (the rarest first)
        become unknown. Raises UserError when there is no room for words.
        """
        pool = vocab_size - len(SPECIALS)
        if pool < 8:
            raise UserError(f"vocab_size {vocab_size} is too small: give at least {8 + len(SPECIALS)}")
        scratch = _pipeline([], None, None)
        read = [scratch.normalizer.normalize_str(cleaned(text, cleaning)) for text in texts]
        counts = Counter("".join(read))
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        known = {*ranked[: min(MAX_ALPHABET, pool // 4)], " "}
        kept = ("".join(c if c in known else " " for c in text).strip() for text in read)
        lines = sorted(filter(None, kept))
        found: list[tuple[str, float]] = []
        if lines:
            # One of the pieces is the trainer's own unknown one.
            trainer = trainers.UnigramTrainer(vocab_size=pool + 1, unk_token=UNK, show_progress=False)
            scratch.train_from_iterator(lines, trainer)
            found = [
                (piece, round(score, DIGITS))
                for piece, score in json.loads(scratch.to_str())["model"]["vocab"]
                if piece != UNK
            ]
        found.sort(key=lambda each: (-each[1], each[0]))
        return cls([*((ASIDE + token, 0.0) for token in SPECIALS), *found[:pool]], cleaning=cleaning)

    @classmethod
    def from_published(cls, path: str | Path) -> UnigramTokenizer:
        """Read a SentencePiece `.model` of type Unigram: its ids stay, and those of SPECIALS that it lacks follow.

        UserError for a model of another type, and for one with settings that no published vocabulary of this kind has.
        """
        path = Path(path)
        data = read_bytes(path, cls.most_bytes)
        try:
            pieces, charsmap = _sentencepiece(data)
            named = {piece for piece, _ in pieces}
            pieces += [(ASIDE + each, 0.0) for each in SPECIALS if ASIDE + each not in named]
            return cls(pieces, charsmap)
        except (ValueError, IndexError, struct.error) as error:
            raise UserError(
                f"{path} is no SentencePiece model that can be read ({error}); give a .model of type Unigram"
            ) from None

    @classmethod
    def _from_content(cls, content: Any) -> UnigramTokenizer:
        model, parts = content["model"], content["normalizer"]["normalizers"]
        if model["type"] != "Unigram":
            raise ValueError(f"its model is {model['type']}")
        tables = [each["precompiled_charsmap"] for each in parts if each["type"] == "Precompiled"]
        own = any(each["type"] == "NFKC" for each in parts)
        charsmap = None if own else base64.b64decode(tables[0], validate=True) if tables else b""
        found = cls([(str(piece), float(score)) for piece, score in model["vocab"]], charsmap)
        rebuilt = json.loads(found.to_json())
        for part in ("normalizer", "pre_tokenizer"):
            if content[part] != rebuilt[part]:
                raise ValueError(f"its {part} is another one")
        return found

    def to_json(self) -> str:
        """The content of `tokenizer.json`: of the largest vocabularies, laid out in lines, it would be too large."""
        return self._inner.to_str() + "\n"

    def _ids(self, row: Any) -> list[int]:
        """An unknown piece becomes its bytes, where the vocabulary has bytes."""
        ids: list[int] = row.ids
        if not self._bytes or self.unk_id not in ids:
            return ids
        found: list[int] = []
        for index, piece in zip(ids, row.tokens, strict=True):
            found += [self._bytes[byte] for byte in piece.encode()] if index == self.unk_id else [index]
        return found

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a 1-D sequence of ids up to the first end, special tokens left out.

        Bytes that are no UTF-8 become U+FFFD.
        """
        bytes_of = {index: byte for byte, index in enumerate(self._bytes)}
        text = b""
        for index in self._until_last(ids):
            if index in bytes_of:
                text += bytes([bytes_of[index]])
            elif index not in self._aside:
                text += self._tokens[index].encode()
        return text.decode("utf-8", "replace").replace(SPACE, " ").strip(" ")


def _pipeline(
    pieces: list[tuple[str, float]], unk_id: int | None, charsmap: bytes | None
) -> tokenizers.Tokenizer:
    """The whole text pipeline around a vocabulary; files are only ever read for their vocabulary and their table."""
    built = tokenizers.Tokenizer(models.Unigram(pieces, unk_id, False) if pieces else models.Unigram())
    table: list[Any] = [normalizers.Nmt(), normalizers.NFKC()] if charsmap is None else []
    if charsmap:
        _check_table(charsmap)
        table = [normalizers.Precompiled(charsmap)]
    spaces = [normalizers.Replace(tokenizers.Regex(a), b) for a, b in ((" {2,}", " "), ("^ | $", ""))]
    built.normalizer = normalizers.Sequence([*table, *spaces])
    # Pieces of several words are found only in whole texts.
    whole = any(SPACE in piece[1:] for piece, _ in pieces)
    built.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=not whole)
    built.decoder = tokenizers.decoders.Metaspace(SPACE, prepend_scheme="always")
    return built


def _check_table(charsmap: bytes) -> None:
    """ValueError for a table of characters whose lookups would leave it: the library reads it unchecked.

    Its form (SentencePiece, normalizer.cc, and darts-clone): the trie's size in bytes, the trie in words of 32 bits, then
    strings that end with a zero byte.
    """
    (size,) = struct.unpack_from("<I", charsmap)
    trie, strings = charsmap[4 : 4 + size], charsmap[4 + size :]
    if size % 1024 or len(trie) != size or not size:
        raise ValueError("its table of characters has another form")
    strings.decode("utf-8")
    units = np.frombuffer(trie, "<u4").astype(np.int64)
    places = np.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6))
    inner = units < 2**31  # the others hold the place of a string
    if ((places | 255)[inner] >= len(units)).any():
        raise ValueError("its table of characters leaves itself")
    leaves = inner & ((units & 256) != 0)
    starts = units[places[leaves]] & (2**31 - 1)
    if (starts >= len(strings)).any() or any(strings[start] & 0xC0 == 0x80 for start in starts.tolist()):
        raise ValueError("its table of characters names what is no string of it")


# SentencePiece, sentencepiece_model.proto: numbers of fields, types of pieces and of models.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}


def _sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """(pieces, charsmap) of a `.model`, a protobuf message. ValueError where it is none, or of another type."""
    listed: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            listed.append((piece[1].decode("utf-8") if 1 in piece else "", score, piece.get(3, _NORMAL)))
        elif number == _TRAINER:
            trainer = dict(_fields(value))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(value))
    model_type = trainer.get(3, 1)
    if model_type != 1:
        name = _MODEL_TYPES.get(model_type, str(model_type))
        raise ValueError(f"its type is {name}; where it has a tokenizer.json beside it, give that")
    if not listed:
        raise ValueError("it has no pieces")
    for fields, field, usual, name in (
        (trainer, 24, 0, "treat_whitespace_as_suffix"),
        (normalizer, 3, 1, "add_dummy_prefix"),
        (normalizer, 4, 1, "remove_extra_whitespaces"),
        (normalizer, 5, 1, "escape_whitespaces"),
    ):
        if fields.get(field, usual) != usual:
            raise ValueError(f"{name} is {bool(fields[field])}, which is not supported")
    highest = max((score for _, score, kind in listed if kind == _NORMAL), default=0.0)
    pieces: list[tuple[str, float]] = []
    for name, score, kind in listed:
        if kind == _UNKNOWN:
            name = UNK
        if kind == _USER_DEFINED and name not in SPECIALS:
            # SentencePiece, unigram_model.cc: what its user defined wins over all cuts of it.
            pieces.append((name, len(name.encode()) * highest - 0.1))
        elif kind == _NORMAL and name not in SPECIALS:
            pieces.append((name, score))
        else:
            pieces.append((ASIDE + name, 0.0))
    charsmap = normalizer.get(2, b"")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: a number, or the bytes of anything else. ValueError where it is none."""
    place = 0

    def number() -> int:
        nonlocal place
        value, shift = 0, 0
        while shift < 64:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    while place < len(data):
        key = number()
        form = key & 7
        if form == 0:
            yield key >> 3, number()
            continue
        length = {1: 8, 5: 4}.get(form) or (number() if form == 2 else None)
        if length is None or place + length > len(data):
            raise ValueError("it is no protobuf message, or is cut off")
        yield key >> 3, data[place : place + length]
        place += length
