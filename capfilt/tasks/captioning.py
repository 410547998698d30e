"""Captioning: BLEU, CIDEr-D and ROUGE-L of generated captions, as coco-caption computes them, without Java.

What lives here: the tokenisation, the three metrics on tokens, and `evaluate_captioning` for a captioner.
What does not: decoding (`capfilt.inference`), and METEOR and SPICE, which exist as Java programs only.

Given the same tokens the figures equal those of coco-caption (the pycocoevalcap package), quirks included,
because published numbers have them. They are reported x100, as papers print them; CIDEr-D already holds a
factor of 10.

CIDEr-D weighs n-grams by how rare they are in the references of the very images evaluated: figures of a
subset and of the whole split, or of two splits, cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from capfilt.errors import RunError, UserError
from capfilt.inference.capabilities import GeneratesText

MAX_N = 4
CIDER_SIGMA = 6.0  # Vedantam et al., CVPR 2015, sec. 8 (CIDEr-D): sigma of the length penalty
ROUGE_BETA = 1.2  # coco-caption: recall weighs 1.2 times precision
# coco-caption's BLEU adds these to counts of matches and of guesses, so that a corpus without a match is not
# 0 / 0.
_TINY, _SMALL = 1e-15, 1e-9

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


# Tokens.

# coco-caption drops these after tokenising. Brackets stay: its list names them in capitals, its tokens are
# lower case.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_SPELLED = str.maketrans(
    {
        "’": "'", "‘": "`", "‚": "`", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "...",
        "€": "$", "£": "#", "¢": " cents ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "\u00a0": " ", "\u00ad": "",
    }
)  # fmt: skip
_ENTITIES = (("&nbsp;", " "), ("&quot;", '"'), ("&apos;", "'"), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))

_ABBREVIATIONS = (
    "Mr|Mrs|Ms|Dr|Prof|Rev|Hon|Sen|Rep|Pres|Gov|Gen|Col|Lt|Capt|Cpl|Pvt|Sgt|Maj|Adm|Jr|Sr|St|Ave|Blvd|Rd|Ft|Mt"
    "|Co|Corp|Inc|Ltd|Bros|Univ|Assn|Dept|Est|Fig|vs|etc|cf|al|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec"
    "|Mon|Tue|Tues|Wed|Thu|Thurs|Fri|Ala|Ariz|Calif|Colo|Conn|Del|Fla|Ga|Ill|Ind|Kan|Ky|La|Md|Mich|Minn|Miss|Mo"
    "|Mont|Neb|Nev|Okla|Ore|Pa|Penn|Tenn|Tex|Va|Vt|Wis|Wyo"
)

_ATOM = r"[^\W_¹²³]+"
_TOKEN = re.compile(
    "|".join(
        [
            # Most words of most captions, before anything dearer is tried.
            r"(?!(?:cannot|gonna|gotta|wanna|lemme|gimme)\b)[a-z]+(?=\s)",
            r"</?[a-z][^<>\s]*>",
            r"https?://[^\s\"<>|()]*[^\s\"<>|().!?,;:-]",
            r"www\.[^\s\"<>|()]*[^\s\"<>|().!?,;:-]",
            r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*",
            r"[@#][a-z]\w*",
            r"[:;=]-?[()\[\]DP](?!\w)",
            # Contractions come apart where the Penn Treebank takes them apart.
            r"(?<!\w)(?:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b(?!-))|lem(?=me\b)|gim(?=me\b)|y'(?=all\b))",
            r"'t(?=is\b|was\b)",
            r"(?<!\w)(?:[cdjlmnot]|ma|qu)'[^\W\d_]{2,}",
            r"n't(?!\w)",
            rf"{_ATOM}?(?=n't(?!\w))",
            r"'(?:s|m|d|ll|re|ve|em|til|cause)(?!\w)",
            r"'n(?!\w)'?",
            r"'\d\ds?(?!\w)",
            # Periods that belong to a word.
            rf"(?<!\w)(?:{_ABBREVIATIONS})\.(?!\w)",
            r"(?<!\w)no\.(?=\s?\d)",
            r"(?<!\w)(?:[^\W\d_]\.)+(?:[^\W\d_](?!\w))?(?:-[^\W\d_]+)?",
            # Numbers, then words with hyphens, slashes, underscores and stray periods inside.
            r"(?<![\d.])[-+]?\d*(?:[.,:]\d+)+(?:-[^\W\d_]+)?",
            r"(?<![\w.])[-+]\d+(?!\w)",
            r"(?-i:[A-Z]+(?:&[A-Z]+)+)",
            rf"{_ATOM}(?:[-/_]{_ATOM})*(?:[.?!][^\W\d_]+)*",
            r"\.{2,}|-{2,}|[?!]{2,}|_+|\*{2,}|#{2,}|@{2,}",
            r"\S",
        ]
    ),
    re.IGNORECASE,
)


def tokenize(text: str) -> list[str]:
    """Lower-case tokens of a caption without punctuation, approximating coco-caption's.

    coco-caption runs Stanford CoreNLP 3.4.1's PTBTokenizer (`-preserveLines -lowerCase`) and removes
    `PUNCTUATION`. The rules here are its rules for what captions hold: contractions come apart (`ca n't`,
    `man 's`), hyphenated words, abbreviations and initials stay whole, brackets become `-lrb-` and are kept,
    runs like `!!` are kept.
    """
    for entity, character in _ENTITIES:
        if "&" in text:
            text = text.replace(entity, character)
    tokens = []
    for match in _TOKEN.finditer(text.translate(_SPELLED)):
        token = match.group().lower()
        if token in PUNCTUATION or token == '"' or not token.strip(".") or not token.strip("-"):
            continue
        # Stanford's tokenizer drops what it has no rule for: the emoji planes, and characters for private
        # use.
        if len(token) == 1 and (ord(token) > 0xFFFF or "\ue000" <= token <= "\uf8ff"):
            continue
        tokens.append(_BRACKET.sub(lambda found: _BRACKETS[found.group()], token))
    return tokens


# Metrics on tokens.

Tokens = Sequence[Sequence[str]]


def bleu(candidates: Tokens, references: Sequence[Tokens]) -> tuple[float, ...]:
    """Corpus BLEU-1 to BLEU-4 in percent (Papineni et al., ACL 2002), each image's closest reference length.

    candidates: one token list per image; references: each image's token lists, at least one. Matches and
    guesses are summed over the corpus before dividing. Raises UserError for no images, or an image without
    references.
    """
    return tuple(bleu_of(bleu_parts(candidates, references).sum(axis=0)[None])[0].tolist())


def bleu_parts(candidates: Tokens, references: Sequence[Tokens]) -> Floats:
    """What BLEU adds up over the corpus, by image: float64 [images, 2 * MAX_N + 2].

    Matches of 1- to 4-grams, guesses of 1- to 4-grams, the candidate's length, the closest reference's. Errors as `bleu`.
    """
    grams = _Grams(candidates, references)
    parts = np.zeros((grams.images, 2 * MAX_N + 2))
    for n, (keys, counts, image_of) in enumerate(grams.levels()):
        ours = keys[:, 0] < grams.images
        size = int(keys[:, 1].max(initial=0)) + 1
        # An n-gram counts up to the most times that any one reference has it.
        shared, where = np.unique(image_of[~ours] * size + keys[~ours, 1], return_inverse=True)
        limit = np.zeros(len(shared), dtype=np.int64)
        np.maximum.at(limit, where, counts[~ours])
        found, place = _lookup(shared, keys[ours, 0] * size + keys[ours, 1])
        images = keys[ours, 0]
        matched = np.minimum(counts[ours][found], limit[place])
        parts[:, n] = np.bincount(images[found], weights=matched, minlength=grams.images)
        parts[:, MAX_N + n] = np.bincount(images, weights=counts[ours], minlength=grams.images)
    parts[:, -2] = grams.lengths[: grams.images]
    parts[:, -1] = grams.closest_lengths()
    return parts


def bleu_of(sums: Floats) -> Floats:
    """BLEU-1 to BLEU-4 in percent, float64 [R, 4], of sums [R, 2 * MAX_N + 2] of `bleu_parts` over images."""
    matches, guesses = sums[:, :MAX_N], sums[:, MAX_N : 2 * MAX_N]
    ratio = (sums[:, -2] + _TINY) / (sums[:, -1] + _SMALL)
    penalty = np.where(ratio >= 1.0, 1.0, np.exp(1.0 - 1.0 / ratio))
    precision = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=1)
    found: Floats = 100.0 * penalty[:, None] * precision ** (1.0 / np.arange(1, MAX_N + 1))
    return found


def cider_d(candidates: Tokens, references: Sequence[Tokens]) -> Floats:
    """CIDEr-D of each image x100: float64 [images]; the corpus figure is the mean (Vedantam et al., CVPR 2015, sec. 8).

    For n = 1..4, candidate and reference are vectors of n-gram counts times idf, with idf = ln(images) -
    ln(max(1, images whose references hold the n-gram)), counted on these very references. Their similarity is
    the inner product, the candidate clipped to the reference, over both norms, times exp(-(difference of
    lengths)^2 / (2 * 6^2)); the mean over n and over references, times 10. As in coco-caption, the length is
    the number of bigrams. On one image every idf is 0, and so is the score. Raises UserError for no images,
    or an image without references.
    """
    grams = _Grams(candidates, references)
    bigrams = np.maximum(grams.lengths - 1, 0)
    owner = grams.image_of[grams.images :]
    gap = (bigrams[owner] - bigrams[grams.images :]).astype(np.float64)
    penalty = np.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
    similarity = np.zeros(len(owner))
    for keys, counts, image_of in grams.levels():
        caption, gram = keys[:, 0], keys[:, 1]
        size = int(gram.max(initial=0)) + 1
        ours = caption < grams.images
        holders = np.unique(image_of[~ours] * size + gram[~ours]) % size
        documents = np.bincount(holders, minlength=size)
        idf = np.log(grams.images) - np.log(np.maximum(documents, 1))
        weight = counts * idf[gram]
        norm = np.sqrt(np.bincount(caption, weights=weight**2, minlength=len(grams.lengths)))
        # Keys are sorted, so the candidates' own are the table that the references are looked up in.
        found, place = _lookup(caption[ours] * size + gram[ours], image_of[~ours] * size + gram[~ours])
        theirs = weight[~ours][found]
        clipped = np.minimum(weight[ours][place], theirs) * theirs
        inner = np.bincount(caption[~ours][found] - grams.images, weights=clipped, minlength=len(owner))
        norms = norm[owner] * norm[grams.images :]
        cosine = np.zeros(len(owner))
        np.divide(inner, norms, out=cosine, where=norms > 0)
        similarity += cosine * penalty
    per_image = np.bincount(owner, weights=similarity / MAX_N, minlength=grams.images)
    return 100.0 * 10.0 * per_image / np.bincount(owner, minlength=grams.images)


def rouge_l(candidates: Tokens, references: Sequence[Tokens]) -> Floats:
    """ROUGE-L of each image in percent: float64 [images]; the corpus figure is the mean (Lin, 2004, sec. 3).

    F of longest common subsequences with beta 1.2, from the best precision and the best recall over the
    references, which may be two different ones, as in coco-caption. An empty candidate scores 0.
    """
    _check(candidates, references)
    scores = np.zeros(len(candidates))
    square = ROUGE_BETA**2
    for image, (candidate, options) in enumerate(zip(candidates, references, strict=True)):
        where: dict[str, int] = {}
        for position, token in enumerate(candidate):
            where[token] = where.get(token, 0) | 1 << position
        common = [(_subsequence(where, len(candidate), option), len(option)) for option in options]
        precision = max((length / len(candidate) for length, _ in common if candidate), default=0.0)
        recall = max((length / size for length, size in common if size), default=0.0)
        if precision > 0 and recall > 0:
            scores[image] = 100.0 * (1 + square) * precision * recall / (recall + square * precision)
    return scores


def _subsequence(where: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence; `where` holds each token's positions as bits.

    Bit-parallel (Hyyro, 2004): the zeros of `row` are the places where the table's row steps up.
    """
    full = (1 << length) - 1
    row = full
    for token in other:
        match = row & where.get(token, 0)
        row = (row + match | row - match) & full
    return length - row.bit_count()


class _Grams:
    """Candidates and references as numbered captions: candidate i is caption i, references follow image by image."""

    def __init__(self, candidates: Tokens, references: Sequence[Tokens]) -> None:
        _check(candidates, references)
        captions = [*candidates, *(option for options in references for option in options)]
        self.images = len(candidates)
        counts = np.array([len(options) for options in references])
        own = np.arange(self.images, dtype=np.int64)
        self.image_of: Ints = np.concatenate([own, np.repeat(own, counts)])
        self.lengths: Ints = np.array([len(caption) for caption in captions], dtype=np.int64)
        numbers: dict[str, int] = {}
        self._words = np.array(
            [numbers.setdefault(word, len(numbers)) for caption in captions for word in caption],
            dtype=np.int64,
        )
        self._vocabulary = max(1, len(numbers))

    def levels(self) -> Iterable[tuple[Ints, Ints, Ints]]:
        """For n = 1..4: (caption, n-gram) pairs int64 [M, 2] in sorted order, their counts [M], their images [M]."""
        caption_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        left = self.lengths[caption_of] - (
            np.arange(len(caption_of)) - np.repeat(_starts(self.lengths), self.lengths)
        )
        position, code = np.arange(len(caption_of)), self._words
        for n in range(1, MAX_N + 1):
            if n > 1:
                fits = left[position] >= n
                position = position[fits]
                # Numbering the n-grams anew each time keeps the product within 64 bits.
                code = code[fits] * self._vocabulary + self._words[position + n - 1]
                code = np.unique(code, return_inverse=True)[1]
            size = int(code.max(initial=0)) + 1
            keys, counts = np.unique(caption_of[position] * size + code, return_counts=True)
            caption, gram = np.divmod(keys, size)
            yield np.stack([caption, gram], axis=1), counts, self.image_of[caption]

    def closest_lengths(self) -> Ints:
        """Each image's reference length nearest to its candidate's, the shorter of two as near: int64 [images]."""
        owner, lengths = self.image_of[self.images :], self.lengths[self.images :]
        order = np.lexsort((lengths, np.abs(lengths - self.lengths[owner]), owner))
        first = np.searchsorted(owner[order], np.arange(self.images))
        return lengths[order][first]


def _starts(lengths: Ints) -> Ints:
    return np.cumsum(lengths) - lengths


def _lookup(table: Ints, keys: Ints) -> tuple[Ints, Ints]:
    """Which `keys` are in the sorted `table`, and where: indices into keys, and into table."""
    if not len(table):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    found = np.flatnonzero(table[place] == keys)
    return found, place[found]


def _check(candidates: Tokens, references: Sequence[Tokens]) -> None:
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions for {len(references)} images with references")
    if not len(candidates):
        raise UserError("captioning: there are no images to evaluate")
    bare = [index for index, options in enumerate(references) if not len(options)]
    if bare:
        raise UserError(
            f"captioning: {len(bare)} images have no reference caption, first number {bare[0]}; leave them out"
        )


# A captioner's figures.


@dataclass(frozen=True)
class CaptioningResult:
    """Figures of a set of captions.

    `metrics` is flat: `bleu@1 .. bleu@4`, `rouge_l`, `cider`, all x100. `cider` and `rouge_l` float64
    [images] are the per-image scores whose means those are, for the bootstrap (the idf stays that of the
    whole set); `bleu` float64 [images, 10] is what BLEU adds up (`bleu_parts`). `captions` are the texts
    judged, empty where the captioner wrote nothing: those score 0 and count.
    """

    metrics: dict[str, float]
    cider: Floats
    rouge_l: Floats
    bleu: Floats
    captions: tuple[str, ...]


def caption_metrics(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> CaptioningResult:
    """BLEU, ROUGE-L and CIDEr-D of one caption per image against its references, as texts.

    Raises UserError for no images, or an image without references.
    """
    texts = tuple(caption or "" for caption in captions)
    candidates = [tokenize(text) for text in texts]
    options = [[tokenize(text) for text in image] for image in references]
    cider, rouge = cider_d(candidates, options), rouge_l(candidates, options)
    parts = bleu_parts(candidates, options)
    metrics = {f"bleu@{n}": float(v) for n, v in enumerate(bleu_of(parts.sum(axis=0)[None])[0], start=1)}
    metrics |= {"rouge_l": float(rouge.mean()), "cider": float(cider.mean())}
    return CaptioningResult(metrics, cider, rouge, parts, texts)


def evaluate_captioning(
    captioner: GeneratesText,
    images: Iterable[Any],
    references: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], object] | None = None,
    **decoding: Any,
) -> CaptioningResult:
    """Captions `images` and judges the captions against `references`, in the same order.

    images: pictures as the captioner takes them (PIL images, bytes or paths), or batches of pictures (lists,
    or tensors with the batch first, from a loader), read lazily; or one tensor or array of all. decoding:
    options of the captioner; beam search with 3 beams unless another `method` is named (BLIP's released COCO
    configuration). Sampled captions do not depend on how the images are batched. progress: called with (done,
    of).

    Raises RunError when images and references differ in number.
    """
    options: dict[str, Any] = (
        decoding if "method" in decoding else {"method": "beam", "num_beams": 3} | decoding
    )
    captions: list[str | None] = []
    for batch in _batches(images, batch_size):
        if options["method"] == "nucleus":
            # The keys that one call with all images would have used.
            options = options | {"keys": [str(len(captions) + offset) for offset in range(len(batch))]}
        captions.extend(caption.text for caption in captioner.caption(batch, **options))
        if progress is not None:
            progress(len(captions), len(references))
    if len(captions) != len(references):
        raise RunError(f"captioning: {len(captions)} captions for {len(references)} images with references")
    return caption_metrics(captions, references)


def _batches(images: Iterable[Any], size: int) -> Iterator[Any]:
    """Batches of at most `size` pictures from pictures; batches of pictures as they are."""
    if isinstance(images, Tensor | np.ndarray):
        yield from (images[start : start + size] for start in range(0, len(images), size))
        return
    single: list[Any] = []
    for each in images:
        if isinstance(each, Tensor | np.ndarray | list | tuple):
            yield each
            continue
        single.append(each)
        if len(single) == size:
            yield single
            single = []
    if single:
        yield single
