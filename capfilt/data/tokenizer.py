"""Text to ids and back: one WordPiece tokenizer for every text model, learned or read from BERT's vocabulary.

Not here: how texts are cleaned (`cleaning.py`), which texts a batch holds (`pairs.py`), or what a model does with position 0
(`models/blip.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from capfilt.data.cleaning import BLIP, MAX_WORDS, cleaned
from capfilt.errors import UserError

PAD, UNK, CLS, SEP, MASK, DEC, ENC = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"
SPECIALS = (PAD, UNK, CLS, SEP, MASK)
ADDED = (DEC, ENC)  # in this order: BLIP's 30522 is [DEC] (its bos token, added first), 30523 is [ENC]
PREFIX = "##"
FILE_NAME = "tokenizer.json"

MAX_TOKENS = 30  # BLIP, official code: pretraining texts hold 30 tokens, [CLS] and [SEP] included
MAX_ALPHABET = 1000  # the `tokenizers` WordPiece trainer's own default
MAX_FILE_BYTES = 16 * 2**20  # published WordPiece and CLIP vocabularies have a tenth of that
MAX_VOCABULARY = 1_000_000  # tokens; the largest published ones have half of that


def _pipeline(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """The whole text pipeline around a vocabulary; files are only ever read for their vocabulary."""
    built = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNK, continuing_subword_prefix=PREFIX))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = tokenizers.decoders.WordPiece(prefix=PREFIX)
    # A text that says "[SEP]" does not end there.
    built.encode_special_tokens = True
    present = [token for token in (*SPECIALS, *ADDED) if token in vocab]
    if len(present) == len(SPECIALS) + len(ADDED):
        built.add_special_tokens(present)
        built.post_processor = processors.BertProcessing((SEP, vocab[SEP]), (CLS, vocab[CLS]))
    return built


class Encodes(Protocol):
    """What a loader and a checkpoint ask of any tokenizer: texts become rows of ids."""

    pad_id: int
    vocab_size: int
    fingerprint: str
    cleaning: str

    def cleaned_as(self, cleaning: str) -> Self:
        """The same vocabulary, for texts cleaned by another of `cleaning.CLEANINGS`."""

    def encode_ragged(
        self, texts: Sequence[str], max_length: int, prompt: str, max_words: int | None, raw: bool = False
    ) -> list[list[int]]:
        """As `Tokenizer.encode_ragged`."""

    def pad(self, rows: Sequence[Sequence[int]], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """As `Tokenizer.pad`."""

    def save(self, directory: Path) -> object:
        """Writes tokenizer.json into the directory."""


class Tokenizer:
    """Lower-case WordPiece with BERT's normalizer, plus [DEC] and [ENC] as the last two ids.

    Attributes: `pad_id unk_id cls_id sep_id mask_id dec_id enc_id` (ints), `vocab_size` (ids are below it),
    `fingerprint` (32 hex digits, a hash of the vocabulary), `cleaning` (one of `cleaning.CLEANINGS`).
    """

    def __init__(self, tokens: Sequence[str], cleaning: str = BLIP) -> None:
        """`tokens[i]` has id i; [PAD] [UNK] [CLS] [SEP] [MASK] anywhere, [DEC] [ENC] last; else ValueError."""
        if len(tokens) > MAX_VOCABULARY:
            raise ValueError(f"{len(tokens):,} tokens are more than {MAX_VOCABULARY:,}")
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise ValueError(f"token {twice!r} is listed more than once")
        for token in SPECIALS:
            if token not in vocab:
                raise ValueError(f"token {token} is missing")
        if tuple(tokens[-2:]) != ADDED:
            raise ValueError(f"the last two tokens are {list(tokens[-2:])}, not {list(ADDED)}")
        self._tokens, self.cleaning = list(tokens), cleaning
        self._inner = _pipeline(vocab)
        self.vocab_size = len(tokens)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIALS)
        self.dec_id, self.enc_id = (vocab[t] for t in ADDED)
        self._special_ids = frozenset(vocab[t] for t in (*SPECIALS, *ADDED))
        self.fingerprint = hashlib.blake2b("\n".join(tokens).encode(), digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[list[str], str]]:
        return Tokenizer, (self._tokens, self.cleaning)

    def cleaned_as(self, cleaning: str) -> Tokenizer:
        """As `Encodes.cleaned_as`."""
        return self if cleaning == self.cleaning else Tokenizer(self._tokens, cleaning)

    # ------------------------------------------------------------------ where one comes from

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 8000, min_frequency: int = 2, cleaning: str = BLIP
    ) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` ids, everything counted, from `texts` after their cleaning.

        The same texts, in any order, give the same vocabulary in every process. Characters beyond a quarter
        of the vocabulary (the rarest first) become [UNK]. Raises UserError when there is no room for words.
        """
        pool = vocab_size - len(SPECIALS) - len(ADDED)
        if pool < 8:
            least = 8 + len(SPECIALS) + len(ADDED)
            raise UserError(f"vocab_size {vocab_size} is too small: give at least {least}")
        read = [found for text in texts if (found := cleaned(text, cleaning, MAX_WORDS).strip())]
        scratch = _pipeline({UNK: 0})
        normalise = scratch.normalizer.normalize_str
        counts: Counter[str] = Counter()
        for text in read:
            counts.update(normalise(text))
        letters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[
            : min(MAX_ALPHABET, pool // 4)
        ]
        letters.sort()
        # The library numbers "##x" pieces in the order of a randomly seeded hash map and breaks ties between
        # merges by those numbers, so two runs learn different vocabularies. Naming the pieces fixes the numbers.
        given = [*SPECIALS, *letters, *(PREFIX + c for c in letters)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size - len(ADDED),
            min_frequency=min_frequency,
            special_tokens=given,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            continuing_subword_prefix=PREFIX,
            show_progress=False,
        )
        scratch.train_from_iterator(sorted(read), trainer)
        learned = sorted(scratch.get_vocab().items(), key=lambda item: item[1])
        return cls([*(token for token, _ in learned), *ADDED], cleaning)

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read a vocabulary in any of its forms: `vocab.txt`, `tokenizer.json`, or the latter's directory."""
        return cls.from_vocab(path) if str(path).endswith(".txt") else cls.load(path)

    @classmethod
    def from_vocab(cls, path: str | Path) -> Tokenizer:
        """Read a `vocab.txt` (one token a line, id = line number) and append [DEC], [ENC].

        bert-base-uncased's 30522 lines give BLIP's [DEC] = 30522 and [ENC] = 30523. Raises UserError.
        """
        path = Path(path)
        tokens = [line.rstrip("\r") for line in read_text(path).split("\n")]
        while tokens and not tokens[-1]:
            tokens.pop()
        if tuple(tokens[-2:]) != ADDED:
            tokens += ADDED
        try:
            return cls(tokens)
        except ValueError as error:
            hint = "give a vocab.txt such as bert-base-uncased's"
            raise UserError(f"{path} is not a WordPiece vocabulary: {error}; {hint}") from None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json` written by `save`: the file, or its directory. Raises UserError.

        Only the vocabulary is taken from the file: its normalizer and pre-tokenizer have to be this class's
        own, so that no pattern from an untrusted file is ever run.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        text = read_text(path)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{path} is not valid JSON: save the tokenizer again") from None
        try:
            tokens = _tokens_of(content)
            made = cls(tokens)
        except ValueError as error:
            hint = "save it again with Tokenizer.save"
            raise UserError(f"{path} is not a capfilt tokenizer: {error}; {hint}") from None
        return made

    def save(self, directory: str | Path) -> Path:
        """Write `directory/tokenizer.json` (created if need be, replaced atomically) and return its path.

        The same vocabulary gives the same bytes. The file also opens with `tokenizers.Tokenizer.from_file`.
        """
        return write_tokenizer(directory, self.to_json())

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._inner.to_str(pretty=True) + "\n"

    # ------------------------------------------------------------------ text to ids

    def encode_ragged(
        self,
        texts: Sequence[str],
        max_length: int = MAX_TOKENS,
        prompt: str = "",
        max_words: int | None = MAX_WORDS,
        raw: bool = False,
    ) -> list[list[int]]:
        """[CLS] prompt text [SEP] as ids, a list per text, unpadded; at most `max_length` ids with [SEP] kept.

        The word limit counts the text's words, not the prompt's (BLIP, official code). `raw` texts are not cleaned
        first, so that "10:30" keeps its colon; no word limit then. Raises ValueError for `max_length` < 2.
        """
        if max_length < 2:
            raise ValueError(f"max_length {max_length} leaves no room for [CLS] and [SEP]")
        lead = self._pieces([prompt], None)[0]
        room = max_length - 2
        return [
            [self.cls_id, *(lead + pieces)[:room], self.sep_id]
            for pieces in self._pieces(texts, max_words, raw)
        ]

    def encode(
        self,
        texts: Sequence[str],
        max_length: int = MAX_TOKENS,
        prompt: str = "",
        pad_to: int | None = None,
        max_words: int | None = MAX_WORDS,
    ) -> tuple[Tensor, Tensor]:
        """Ids (int64 [B, L]) and mask (bool [B, L], True where not padding) of `encode_ragged`.

        L is the longest text's length, or `pad_to` where given (ValueError when that is smaller than a text).
        """
        return self.pad(self.encode_ragged(texts, max_length, prompt, max_words), pad_to)

    def pad(self, rows: Sequence[Sequence[int]], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Lists of ids as one int64 [B, L] tensor and its bool mask; L as in `encode`."""
        return pad_rows(rows, self.pad_id, pad_to)

    def prompt_length(self, prompt: str) -> int:
        """How many leading positions carry no language-model loss: position 0 and the prompt's pieces.

        4 for "a picture of " (BLIP, official code: the label is masked for [DEC], a, picture, of).
        """
        return 1 + len(self._pieces([prompt], None)[0])

    def _pieces(self, texts: Sequence[str], max_words: int | None, raw: bool = False) -> list[list[int]]:
        read = list(texts) if raw else [cleaned(text, self.cleaning, max_words) for text in texts]
        return [row.ids for row in self._inner.encode_batch(read, add_special_tokens=False)]

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a 1-D sequence of ids up to the first [SEP], special tokens and unknown ids left out.

        Apostrophes inside a word and commas after one are closed up ("man ' s" gives "man's"); hyphens stay
        apart, as in BLIP's published captions.
        """
        listed: list[int] = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        words: list[str] = []
        for index in listed:
            if index == self.sep_id:
                break
            if index in self._special_ids or not 0 <= index < self.vocab_size:
                continue
            piece = self._tokens[index]
            if piece.startswith(PREFIX) and len(piece) > len(PREFIX) and words:
                words[-1] += piece[len(PREFIX) :]
            else:
                words.append(piece)
        text = re.sub(r"(?<=\w) ' (?=\w)", "'", " ".join(words))
        return re.sub(r" (?=[,?](?: |$))", "", text)

    def decode_batch(self, rows: Iterable[Sequence[int] | Tensor]) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row) for row in rows]

    def token(self, index: int) -> str:
        """The piece with this id. Raises IndexError outside the vocabulary."""
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"id {index} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[index]

    def __len__(self) -> int:
        return self.vocab_size


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """Lists of ids as one int64 [B, L] tensor and its bool mask; L is the longest's length, or `pad_to`."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if pad_to is not None and pad_to < longest:
        raise ValueError(f"pad_to {pad_to} is smaller than a text of {longest} tokens")
    mask = np.arange(longest if pad_to is None else pad_to) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.fromiter((number for row in rows for number in row), dtype=np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def write_tokenizer(directory: str | Path, text: str) -> Path:
    """Write `directory/tokenizer.json` (created if need be, replaced atomically) and return its path."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / FILE_NAME
    attempt = directory / f".{FILE_NAME}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        attempt.write_text(text, encoding="utf-8", newline="\n")
        attempt.replace(target)
    finally:
        attempt.unlink(missing_ok=True)
    return target


def read_text(path: Path, most: int = MAX_FILE_BYTES) -> str:
    """A vocabulary's or config's file. UserError where it cannot be read, is no UTF-8, or is too large for one."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file that can") from None
    if len(data) > most:
        raise UserError(f"{path} is larger than {most:,} bytes: that is no vocabulary, and no config")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: name a vocabulary or config that is") from None


def _tokens_of(content: Any) -> list[str]:
    """The vocabulary in id order from a parsed tokenizer.json. Raises ValueError saying what is wrong."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no model")
    reference = json.loads(_pipeline({UNK: 0}).to_str())
    for part in ("normalizer", "pre_tokenizer"):
        if content.get(part) != reference[part]:
            raise ValueError(f"its {part} is another one")
    model = content["model"]
    if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix") != PREFIX:
        raise ValueError("its model is not WordPiece with ## pieces")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise ValueError("its vocabulary is not a map from token to id")
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids do not run from 0 without a gap")
    return tokens
