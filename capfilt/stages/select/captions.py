"""Faults of a caption that no score sees, and the named words of the web text that it keeps. No pictures, no scores.

Words are runs of letters and digits, compared without case; signs between them say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from capfilt.stages.subset.words import WORD
from capfilt.tables.contracts import MAX_TEXT_CHARACTERS

DEGENERATE, REPEATED, COMMON = "degenerate", "repeated", "common"

_LOOKED_AT = 200
"""Words of a caption that are looked at: a captioner that repeats itself has begun by then."""


def bare(text: str | None) -> str:
    """A text without case and punctuation: its words, one space apart; "" where it has none."""
    return " ".join(word.casefold() for word in WORD.findall((text or "")[:MAX_TEXT_CHARACTERS]))


def degenerate(text: str) -> bool:
    """Whether a text, `bare`, says nothing, or at least half of its words say the phrase before them again."""
    words = text.split()[:_LOOKED_AT]
    if not words:
        return True
    for length in range(1, len(words) // 2 + 1):
        again = 0
        for place in range(length, len(words)):
            again = again + 1 if words[place] == words[place - length] else 0
            # A phrase that is only begun again is no repetition: "a man and a".
            if again >= length and 2 * again >= len(words):
                return True
    return False


def faults(
    order: Iterable[int],
    images: Sequence[str],
    texts: Sequence[str],
    found: Iterable[tuple[str, str]],
    common: frozenset[str],
) -> dict[int, str]:
    """DEGENERATE, REPEATED or COMMON by the place of each caption that is.

    `order` has the places of the captions to look at: of several equal captions of a picture, the first in it stays.
    `images` and `texts`, `bare`, are by place; `found` has the found texts as (image, `bare` text). `common` are the texts
    that too many pictures have.
    """
    said, made = set(found), {}
    for place in order:
        text = texts[place]
        if degenerate(text):
            made[place] = DEGENERATE
        elif text in common:
            made[place] = COMMON
        elif (images[place], text) in said:
            made[place] = REPEATED
        said.add((images[place], text))
    return made


def common_captions(shards: Iterable[Iterable[tuple[str, str]]], share: float) -> frozenset[str]:
    """The texts that more than `share` of all captioned pictures have; a shard is (image, `bare` text) of its captions.

    A text of one picture alone is never among them, however few pictures there are.
    """
    counts, pictures = Counter[str](), 0
    for shard in shards:
        pairs = set(shard)
        pictures += len({image for image, _ in pairs})
        counts.update(text for _, text in pairs)
    return frozenset(text for text, count in counts.items() if count > max(1.0, share * pictures))


def named_words(text: str | None) -> set[str]:
    """The words of a text that name something, without case: those with a capital after the first word, and numbers."""
    words = WORD.findall((text or "")[:MAX_TEXT_CHARACTERS])
    return {
        word.casefold()
        for place, word in enumerate(words)
        if any(sign.isdigit() for sign in word) or (place and word[0].isupper())
    }
