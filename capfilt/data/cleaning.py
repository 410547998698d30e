"""How a family's texts are cleaned before they become ids, as its released code does, and so as its checkpoints were trained.

A tokenizer knows its cleaning by name, and a checkpoint remembers it (`tokenizer.py`, `bpe.py`, `models/checkpoint.py`).
"""

from __future__ import annotations

import html
import importlib
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

MAX_WORDS = 30  # BLIP (arXiv 2201.12086), official code: captions are cut to 30 words before tokenising

_BLIP_SIGNS = '.!"()*#:;~'  # BLIP, official code: `pre_caption` and `pre_question`
_ALBEF_SIGNS = ",.'!?\"()*#:;~"  # ALBEF, official code: the same two
_TO_SPACE = str.maketrans(dict.fromkeys(_BLIP_SIGNS, " "))


def clean(text: str, max_words: int | None = MAX_WORDS) -> str:
    """BLIP's `pre_caption`: lower-case; `. ! " ( ) * # : ; ~` and white space to one space; cut to `max_words`.

    Control, format and unassigned characters go as well (BERT's normalizer would drop them later), so that a
    text of nothing visible is "". `max_words=None` keeps every word. White space of any kind separates words, where the
    released code counts what single spaces separate.
    """
    text = text.lower().translate(_TO_SPACE)
    if not text.isprintable():
        text = "".join(c for c in text if c.isspace() or not unicodedata.category(c).startswith("C"))
    return " ".join(text.split()[:max_words])


def _question(signs: str, spaces: str, text: str, max_words: int | None) -> str:
    """BLIP's and ALBEF's `pre_question`: `signs` go, `spaces` become one; words are what single spaces separate."""
    text = text.lower().translate(str.maketrans(spaces, " " * len(spaces), signs))
    return " ".join(text.rstrip(" ").split(" ")[:max_words])


def _albef(text: str, max_words: int | None) -> str:
    """ALBEF's `pre_caption`: signs go, and are no spaces as BLIP's are; hyphens and slashes are; <person> is a word."""
    text = _question(_ALBEF_SIGNS, "-/", text, None).replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def _as_found(text: str, max_words: int | None) -> str:
    """ViLT's: none. Lower-casing and accents are BERT's normalizer's business."""
    return text if max_words is None else " ".join(text.split()[:max_words])


def _clip(repair: Callable[[], Callable[[str], str]], text: str, max_words: int | None) -> str:
    """CLIP's `whitespace_clean(basic_clean(text)).lower()`: repaired Unicode, HTML entities twice, single spaces."""
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(repair()(text))).strip()).lower()
    return text if max_words is None else " ".join(text.split()[:max_words])


@lru_cache(maxsize=1)
def _ftfy() -> Callable[[str], str]:
    """ftfy's `fix_text`; without ftfy what it always does, composing characters, said once."""
    try:
        found: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    except ImportError:
        warnings.warn(
            "CLIP's released code repairs mis-decoded texts with ftfy, which is not installed: such texts are read as "
            "they are; pip install 'capfilt[clip]'",
            RuntimeWarning,
            stacklevel=2,
        )
        return _composed
    return found


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


BLIP, BLIP_QUESTIONS, ALBEF, ALBEF_QUESTIONS = "blip", "blip-questions", "albef", "albef-questions"
AS_FOUND, CLIP, CLIP_UNREPAIRED = "as-found", "clip", "clip-unrepaired"

CLEANINGS: Mapping[str, Callable[[str, int | None], str]] = {
    BLIP: clean,
    BLIP_QUESTIONS: partial(_question, _BLIP_SIGNS, ""),
    ALBEF: _albef,
    ALBEF_QUESTIONS: partial(_question, _ALBEF_SIGNS, "-/"),
    AS_FOUND: _as_found,
    CLIP: partial(_clip, _ftfy),
    CLIP_UNREPAIRED: partial(_clip, lambda: _composed),
}
"""By the name that a checkpoint remembers: (text, most words or None) -> the text that is cut into tokens."""

OF_QUESTIONS = {BLIP: BLIP_QUESTIONS, ALBEF: ALBEF_QUESTIONS}
"""How a family that cleans its captions so cleans its questions, where that differs."""


def trained(cleaning: str) -> str:
    """The cleaning of a model that is trained here: CLIP's own only where ftfy is installed."""
    return CLIP_UNREPAIRED if cleaning == CLIP and _ftfy() is _composed else cleaning


def cleaned(text: str, cleaning: str, max_words: int | None = None) -> str:
    """The text as `cleaning`, one of CLEANINGS, leaves it: cut to `max_words`, and of characters that UTF-8 has."""
    found = CLEANINGS[cleaning](text, max_words)
    return found if found.isascii() else found.encode("utf-8", "ignore").decode("utf-8")
