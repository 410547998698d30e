"""Text to ids and back: what all tokenizers share, and WordPiece, learned or read from BERT's vocabulary.

Not here: the other tokenizers (`bpe.py`, `unigram.py`), how texts are cleaned (`cleaning.py`), which texts a batch holds
(`pairs.py`), or what a model does with position 0 (`models/blip.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from capfilt.data.cleaning import AS_FOUND, BLIP, MAX_WORDS, cleaned
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


OWN = -1
"""A limit of the tokenizer's own: `Subwords.longest` or `Subwords.most_words`."""


class Subwords(ABC):
    """What all tokenizers share: a vocabulary, texts cleaned and cut to ids between two special ones, padding, files.

    Attributes: `vocab_size` (ids are below it), `pad_id`, `first_id` and `last_id` (of every text), `fingerprint` (32 hex
    digits, a hash of the vocabulary), `cleaning` (one of `cleaning.CLEANINGS`), `longest` and `most_words` (of a text).
    """

    longest: ClassVar[int] = MAX_TOKENS
    most_words: ClassVar[int | None] = MAX_WORDS
    most_bytes: ClassVar[int] = MAX_FILE_BYTES
    published_as: ClassVar[str]
    """Which file of others `from_published` reads, for messages."""
    pad_id: int
    first_id: int
    last_id: int
    fingerprint: str
    _inner: tokenizers.Tokenizer

    def __init__(self, tokens: Sequence[str], cleaning: str) -> None:
        """`tokens[i]` has id i. ValueError where there are too many, or a token comes twice."""
        if len(tokens) > MAX_VOCABULARY:
            raise ValueError(f"{len(tokens):,} tokens are more than {MAX_VOCABULARY:,}")
        self._vocab = {token: index for index, token in enumerate(tokens)}
        if len(self._vocab) != len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise ValueError(f"token {twice!r} is listed more than once")
        self._tokens, self.cleaning, self.vocab_size = list(tokens), cleaning, len(tokens)

    @abstractmethod
    def _made_of(self) -> tuple[Any, ...]:
        """The arguments that make it, without the cleaning."""

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (*self._made_of(), self.cleaning)

    def cleaned_as(self, cleaning: str) -> Self:
        """As `Encodes.cleaned_as`."""
        made: Any = type(self)
        return self if cleaning == self.cleaning else made(*self._made_of(), cleaning)

    # ------------------------------------------------------------------ files

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a vocabulary in any of its forms: `tokenizer.json`, its directory, or as `from_published` does."""
        own = Path(path).is_dir() or str(path).endswith(".json")
        return cls.load(path) if own else cls.from_published(path)

    @classmethod
    @abstractmethod
    def from_published(cls, path: str | Path) -> Self:
        """Read the file in which vocabularies of this kind are published. Raises UserError."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json` written by `save`: the file, or its directory. Raises UserError.

        Only data is taken from the file: no pattern from an untrusted file is ever run.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        text = read_text(path, cls.most_bytes)
        try:
            return cls._from_content(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            hint = f"save it again with {cls.__name__}.save, or give {cls.published_as}"
            raise UserError(f"{path} is no tokenizer that {cls.__name__} reads ({why}); {hint}") from None

    @classmethod
    @abstractmethod
    def _from_content(cls, content: Any) -> Self:
        """Of a parsed tokenizer.json; ValueError, KeyError or TypeError where it is another's."""

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
        max_length: int = OWN,
        prompt: str = "",
        max_words: int | None = OWN,
        raw: bool = False,
    ) -> list[list[int]]:
        """First id, prompt, text, last id, a list per text, unpadded; at most `max_length` ids with the last one kept.

        The word limit (None: no limit) counts the text's words, not the prompt's (BLIP, official code). `raw` texts are not
        cleaned first, so that "10:30" keeps its colon; no word limit then. Raises ValueError for a `max_length` of 0 or 1.
        """
        max_length = self.longest if max_length == OWN else max_length
        if max_length < 2:
            raise ValueError(f"max_length {max_length} leaves no room for the first and the last token")
        lead = self._pieces([prompt], None)[0] if prompt else []
        room = max_length - 2
        return [
            [self.first_id, *(lead + pieces)[:room], self.last_id]
            for pieces in self._pieces(texts, max_words, raw)
        ]

    def encode(
        self,
        texts: Sequence[str],
        max_length: int = OWN,
        prompt: str = "",
        pad_to: int | None = None,
        max_words: int | None = OWN,
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
        most = self.most_words if max_words == OWN else max_words
        read = list(texts) if raw else [cleaned(text, self.cleaning, most) for text in texts]
        return [self._ids(row) for row in self._inner.encode_batch(read, add_special_tokens=False)]

    def _ids(self, row: Any) -> list[int]:
        """The ids of an `Encoding`."""
        ids: list[int] = row.ids
        return ids

    # ------------------------------------------------------------------ ids to text

    @abstractmethod
    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a 1-D sequence of ids up to the first last token, without special tokens."""

    def decode_batch(self, rows: Iterable[Sequence[int] | Tensor]) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row) for row in rows]

    def _until_last(self, ids: Sequence[int] | Tensor) -> list[int]:
        """The ids before the first `last_id`, those that are in the vocabulary."""
        listed: list[int] = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        if self.last_id in listed:
            listed = listed[: listed.index(self.last_id)]
        return [index for index in listed if 0 <= index < self.vocab_size]

    def token(self, index: int) -> str:
        """The piece with this id. Raises IndexError outside the vocabulary."""
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"id {index} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[index]

    def __len__(self) -> int:
        return self.vocab_size


class NoTexts(Subwords):
    """The tokenizer of a model without a text side: every text becomes no ids, and nothing is written."""

    pad_id = first_id = last_id = 0
    fingerprint = ""

    def __init__(self, cleaning: str = AS_FOUND) -> None:
        super().__init__((), cleaning)

    def _made_of(self) -> tuple[()]:
        return ()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 0, cleaning: str = AS_FOUND) -> NoTexts:
        """One, whatever the texts."""
        return cls(cleaning)

    @classmethod
    def from_published(cls, path: str | Path) -> NoTexts:
        """UserError: there is nothing to read."""
        raise UserError(f"{path}: this model has no text side, and takes no vocabulary")

    @classmethod
    def load(cls, path: str | Path) -> NoTexts:
        """One, whatever the directory holds."""
        return cls()

    @classmethod
    def _from_content(cls, content: Any) -> NoTexts:
        return cls()

    def save(self, directory: str | Path) -> Path:
        """Writes nothing, and returns the directory."""
        return Path(directory)

    def _pieces(self, texts: Sequence[str], max_words: int | None, raw: bool = False) -> list[list[int]]:
        return [[] for _ in texts]

    def encode_ragged(
        self,
        texts: Sequence[str],
        max_length: int = OWN,
        prompt: str = "",
        max_words: int | None = OWN,
        raw: bool = False,
    ) -> list[list[int]]:
        """An empty list per text."""
        return self._pieces(texts, max_words)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """No text."""
        return ""


def hashed(*parts: str) -> str:
    """32 hex digits of what decides a vocabulary."""
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


class Tokenizer(Subwords):
    """Lower-case WordPiece with BERT's normalizer, plus [DEC] and [ENC] as the last two ids.

    Attributes: those of `Subwords`, and `unk_id cls_id sep_id mask_id dec_id enc_id`.
    """

    published_as = "a vocab.txt such as bert-base-uncased's"

    def __init__(self, tokens: Sequence[str], cleaning: str = BLIP) -> None:
        """`tokens[i]` has id i; [PAD] [UNK] [CLS] [SEP] [MASK] anywhere, [DEC] [ENC] last; else ValueError."""
        super().__init__(tokens, cleaning)
        vocab = self._vocab
        for token in SPECIALS:
            if token not in vocab:
                raise ValueError(f"token {token} is missing")
        if tuple(tokens[-2:]) != ADDED:
            raise ValueError(f"the last two tokens are {list(tokens[-2:])}, not {list(ADDED)}")
        self._inner = _pipeline(vocab)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (vocab[t] for t in SPECIALS)
        self.dec_id, self.enc_id = (vocab[t] for t in ADDED)
        self.first_id, self.last_id = self.cls_id, self.sep_id
        self._special_ids = frozenset(vocab[t] for t in (*SPECIALS, *ADDED))
        self.fingerprint = hashed("\n".join(tokens))

    def _made_of(self) -> tuple[list[str]]:
        return (self._tokens,)

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
    def from_published(cls, path: str | Path) -> Tokenizer:
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
            raise UserError(
                f"{path} is not a WordPiece vocabulary: {error}; give {cls.published_as}"
            ) from None

    @classmethod
    def _from_content(cls, content: Any) -> Tokenizer:
        return cls(_tokens_of(content))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a 1-D sequence of ids up to the first [SEP], special tokens and unknown ids left out.

        Apostrophes inside a word and commas after one are closed up ("man ' s" gives "man's"); hyphens stay
        apart, as in BLIP's published captions.
        """
        words: list[str] = []
        for index in self._until_last(ids):
            if index in self._special_ids:
                continue
            piece = self._tokens[index]
            if piece.startswith(PREFIX) and len(piece) > len(PREFIX) and words:
                words[-1] += piece[len(PREFIX) :]
            else:
                words.append(piece)
        text = re.sub(r"(?<=\w) ' (?=\w)", "'", " ".join(words))
        return re.sub(r" (?=[,?](?: |$))", "", text)


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


def read_bytes(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """A vocabulary's or config's file. UserError where it cannot be read, or is too large for one."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file that can") from None
    if len(data) > most:
        raise UserError(f"{path} is larger than {most:,} bytes: that is no vocabulary, and no config")
    return data


def read_text(path: Path, most: int = MAX_FILE_BYTES) -> str:
    """As `read_bytes`; UserError too where it is no UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
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
