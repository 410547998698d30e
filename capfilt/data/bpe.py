"""Text to ids for CLIP: byte-level BPE with a start and an end token, learned, or read from published merges.

Not here: what all tokenizers share, and WordPiece (`tokenizer.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from capfilt.data.cleaning import CLIP, cleaned
from capfilt.data.tokenizer import Subwords, hashed, read_text
from capfilt.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CONTEXT = 77  # CLIP, arXiv 2103.00020, sec. 2.4 and code

# CLIP, released code: contractions, runs of letters, single digits, runs of anything else that is visible.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class BpeTokenizer(Subwords):
    """Byte-level BPE as CLIP has it. Padding is id 0 after the end token, as in the released code.

    Attributes: those of `Subwords`, and `start_id`, `end_id`, the last two.
    """

    longest = CONTEXT
    most_words = None
    published_as = "merges.txt"
    pad_id = 0
    specials = (START, END)

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[tuple[str, str]], cleaning: str = CLIP
    ) -> None:
        """`tokens[i]` has id i, the last two are START and END; `merges` in order of rank. ValueError where that cannot be."""
        super().__init__(tokens, cleaning)
        vocab = self._vocab
        if tuple(tokens[-2:]) != (START, END):
            raise ValueError(f"the last two tokens are {list(tokens[-2:])}, not {START} and {END}")
        for left, right in merges:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise ValueError(f"merge {left!r} + {right!r} names what is no token")
        self._merges = [(left, right) for left, right in merges]
        self._inner = _pipeline(models.BPE(vocab, self._merges, end_of_word_suffix=WORD_END, unk_token=END))
        self._json = super().to_json()
        if cleaning == CLIP:
            # The released code composes characters while it repairs a text, and not those of HTML entities.
            self._inner.normalizer = normalizers.Sequence([])
        self.start_id, self.end_id = self.first_id, self.last_id = vocab[START], vocab[END]
        self.fingerprint = hashed("\n".join(tokens), "\n".join(map(" ".join, self._merges)))

    def _made_of(self) -> tuple[list[str], list[tuple[str, str]]]:
        return self._tokens, self._merges

    def to_json(self) -> str:
        return self._json

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
    def from_published(cls, path: str | Path) -> BpeTokenizer:
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
    def _from_content(cls, content: Any) -> BpeTokenizer:
        """A file of transformers will do too."""
        model = content["model"]
        vocab = dict(model["vocab"])
        tokens = sorted(vocab, key=vocab.__getitem__)
        pairs = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
        if sorted(vocab.values()) != list(range(len(vocab))) or any(len(pair) != 2 for pair in pairs):
            raise ValueError("ids do not count 0, 1, 2, ..., or a merge is none")
        return cls(tokens, [(str(left), str(right)) for left, right in pairs])

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids up to the first end token."""
        text: str = self._inner.decode([each for each in self._until_last(ids) if each != self.start_id])
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
