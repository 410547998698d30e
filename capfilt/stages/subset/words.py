"""Which word may stand in another's place: the noise kind `changed_word`. Which texts get it is the stage's business.

Two words are of one kind where the texts have both in one frame: between the same two words ("a _ dog"). Frames find
word classes without a tagger, in any language (Mintz, Cognition 90, 2003, 91-117).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

_ENGLISH = (
    "a about above across after against all along also an and another any are around as at away back be been before "
    "behind being below beneath beside between both but by can down during each for from front had has have he her his "
    "how if in inside into is it its just like many more most near next no not of off on one onto or other out outside "
    "over past she some such than that the their them then there these they this those through to together toward "
    "towards under up upon very was were what when where which while who whose will with"
)
FUNCTIONWORDS = frozenset(_ENGLISH.split())
"""English words that say little of a picture. They are never swapped; frames are made of them and of all others."""


class Swaps:
    """The words of some texts by their frames."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._frames: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for text in texts:
            for _, frame, word in _framed(text):
                self._frames[frame][word] += 1

    def changed(self, text: str, own: Sequence[str], rng: np.random.Generator) -> str | None:
        """`text` with one word swapped for another of its frame; None where no word has another.

        The place is drawn uniformly; the word as often as the frame has it. Words of `own`, the picture's
        texts, are not drawn, as they may be true of it.
        """
        known = {word.casefold() for each in own for word in WORD.findall(each)}
        places = []
        for match, frame, _ in _framed(text):
            others = {word: count for word, count in self._frames.get(frame, {}).items() if word not in known}
            if others:
                places.append((match, others))
        if not places:
            return None
        match, others = places[int(rng.integers(len(places)))]
        counts = np.array(list(others.values()), dtype=np.float64)
        word = list(others)[int(rng.choice(len(counts), p=counts / counts.sum()))]
        if match.group()[0].isupper():
            word = word[0].upper() + word[1:]
        return text[: match.start()] + word + text[match.end() :]


def _framed(text: str) -> list[tuple[re.Match[str], tuple[str, str], str]]:
    """Every content word of a text: where it is, the words around it ("" at an end), and itself in lower case."""
    matches = list(WORD.finditer(text))
    words = ["", *(match.group().casefold() for match in matches), ""]
    return [
        (match, (words[place], words[place + 2]), words[place + 1])
        for place, match in enumerate(matches)
        if words[place + 1] not in FUNCTIONWORDS
    ]
