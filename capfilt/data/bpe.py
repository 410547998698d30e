"""Text to ids for CLIP: byte-level BPE with a start and an end token, learned, or read from published merges.

The one tokenizer of BERT-like models is `tokenizer.py`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from capfilt.data.cleaning import CLIP, cleaned
from capfilt.data.tokenizer import FILE_NAME, MAX_VOCABULARY, pad_rows, read_text, write_tokenizer
from capfilt.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CONTEXT = 77  # CLIP, arXiv 2103.00020, sec. 2.4 and code

# CLIP, released code: contractions, runs of letters, single digits, runs of anything else that is visible.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class BpeTokenizer:
    """Byte-level BPE as CLIP has it. Padding is id 0 after the end token, as in the released code.

    Attributes: `vocab_size`; `start_id`, `end_id`, the last two; `pad_id`; `fingerprint`, a hash of the vocabulary and merges;
    `cleaning`, one of `cleaning.CLEANINGS`.
    """

    pad_id = 0
    specials = (START, END)

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[tuple[str, str]], cleaning: str = CLIP
    ) -> None:
        """`tokens[i]` has id i, the last two are START and END; `merges` in order of rank. ValueError where that cannot be."""
        if len(tokens) > MAX_VOCABULARY:
            raise ValueError(f"{len(tokens):,} tokens are more than {MAX_VOCABULARY:,}")
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            raise ValueError("a token is listed twice")
        if tuple(tokens[-2:]) != (START, END):
            raise ValueError(f"the last two tokens are {list(tokens[-2:])}, not {START} and {END}")
        for left, right in merges:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise ValueError(f"merge {left!r} + {right!r} names what is no token")
        self._tokens, self._merges = list(tokens), [(left, right) for left, right in merges]
        self.cleaning = cleaning
        self._inner = _pipeline(models.BPE(vocab, self._merges, end_of_word_suffix=WORD_END, unk_token=END))
        self._json = self._inner.to_str(pretty=True) + "\n"
        if cleaning == CLIP:
            # The released code composes characters while it repairs a text, and not those of HTML entities.
            self._inner.normalizer = normalizers.Sequence([])
        self.vocab_size = len(tokens)
        self.start_id, self.end_id = vocab[START], vocab[END]
        digest = hashlib.blake2b("\n".join(tokens).encode(), digest_size=16)
        digest.update("\n".join(map(" ".join, self._merges)).encode())
        self.fingerprint = digest.hexdigest()

    def __reduce__(self) -> tuple[type[BpeTokenizer], tuple[list[str], list[tuple[str, str]], str]]:
        return BpeTokenizer, (self._tokens, self._merges, self.cleaning)

    def cleaned_as(self, cleaning: str) -> BpeTokenizer:
        """As `Encodes.cleaned_as`."""
        return self if cleaning == self.cleaning else BpeTokenizer(self._tokens, self._merges, cleaning)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 8000, min_frequency: int = 2, cleaning: str = CLIP
    ) -> BpeTokenizer:
        """Learn at most `vocab_size` ids, everything counted, from `texts` after their cleaning; 514 of them are fixed.

        The same texts, in any order, give the same vocabulary.
        """
        alphabet = _alphabet()
        least = 2 * len(alphabet) + 2
        if vocab_size < least + 8:
            raise UserError(f"vocab_size {vocab_size} is too small: give at least {least + 8}")
        scratch = _pipeline(models.BPE(unk_token=None, end_of_word_suffix=WORD_END))
        # Both forms of every byte, named so that they get the first ids in a fixed order, as CLIP's have.
        given = [*alphabet, *(letter + WORD_END for letter in alphabet)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=min_frequency,
            special_tokens=given,
            initial_alphabet=alphabet,
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        read = (cleaned(text, cleaning) for text in texts)
        scratch.train_from_iterator(sorted(filter(None, read)), trainer)
        content = json.loads(scratch.to_str())["model"]
        tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
        return cls([*tokens, START, END], [tuple(pair) for pair in content["merges"]], cleaning)

    @classmethod
    def open(cls, path: str | Path) -> BpeTokenizer:
        """Read a vocabulary in any of its forms: `tokenizer.json`, its directory, or merges (`from_merges`)."""
        own = Path(path).is_dir() or str(path).endswith(".json")
        return cls.load(path) if own else cls.from_merges(path)

    @classmethod
    def from_merges(cls, path: str | Path) -> BpeTokenizer:
        """Read a published `merges.txt` (or OpenAI's `bpe_simple_vocab_16e6.txt`): a header, then one merge a line.

        Of the latter's lines the first 48,894 count, which makes CLIP's 49,408 ids. Raises UserError.
        """
        path = Path(path)
        lines = read_text(path).split("\n")[1 : 1 + 49152 - 256 - 2]
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line.strip())]
        alphabet = _alphabet()
        tokens = [*alphabet, *(each + WORD_END for each in alphabet), *(a + b for a, b in merges), START, END]
        try:
            return cls(tokens, merges)
        except ValueError as error:
            raise UserError(f"{path} does not hold CLIP's merges: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> BpeTokenizer:
        """Read a `tokenizer.json` (its directory will do) that `save` or transformers wrote. Raises UserError.

        Only vocabulary and merges are taken from it: no pattern from a file is ever run.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            model = json.loads(read_text(path))["model"]
            vocab = dict(model["vocab"])
            tokens = sorted(vocab, key=vocab.__getitem__)
            pairs = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
            if sorted(vocab.values()) != list(range(len(vocab))) or any(len(pair) != 2 for pair in pairs):
                raise ValueError("ids do not count 0, 1, 2, ..., or a merge is none")
            return cls(tokens, [(str(left), str(right)) for left, right in pairs])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} is no CLIP tokenizer ({error}); save it again, or give merges.txt"
            ) from None

    def save(self, directory: str | Path) -> Path:
        """Write `directory/tokenizer.json`, replaced atomically, and return its path."""
        return write_tokenizer(directory, self._json)

    def encode_ragged(
        self,
        texts: Sequence[str],
        max_length: int = CONTEXT,
        prompt: str = "",
        max_words: int | None = None,
        raw: bool = False,
    ) -> list[list[int]]:
        """Start, prompt and text, end as ids, a list per text; at most `max_length` ids, the end kept (CLIP, code: `truncate`).

        `max_words` cuts texts before that; `raw` texts are not cleaned first. Raises ValueError for `max_length` < 2.
        """
        if max_length < 2:
            raise ValueError(f"max_length {max_length} leaves no room for start and end")
        read = list(texts) if raw else [cleaned(text, self.cleaning, max_words) for text in texts]
        found = self._inner.encode_batch([prompt + text for text in read], add_special_tokens=False)
        return [[self.start_id, *row.ids[: max_length - 2], self.end_id] for row in found]

    def encode(
        self, texts: Sequence[str], max_length: int = CONTEXT, max_words: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] and mask bool [B, L] (True where not padding), L the longest text's length."""
        return self.pad(self.encode_ragged(texts, max_length, max_words=max_words))

    def pad(self, rows: Sequence[Sequence[int]], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Lists of ids as one int64 [B, L] tensor and its bool mask, L the longest's length, or `pad_to`."""
        return pad_rows(rows, self.pad_id, pad_to)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids up to the first end token."""
        listed: list[int] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.end_id in listed:
            listed = listed[: listed.index(self.end_id)]
        text: str = self._inner.decode([each for each in listed if each != self.start_id])
        return text.strip()


def _pipeline(model: models.BPE) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(model)
    built.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    built.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    built.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(WORD_END, " ")])
    return built


def _alphabet() -> list[str]:
    """The 256 letters that stand for bytes, in CLIP's order: what can be printed first, by code point, then the rest."""
    letters: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return sorted(letters, key=lambda letter: (ord(letter) >= 256, ord(letter)))
