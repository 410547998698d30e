"""Answers to questions about pictures as VQA compares them: their normal form, what an answer is worth, closed lists.

The rules are those of VQA's evaluation (Antol et al., arXiv 1505.00468; visualqa.org/evaluation.html), the slips of its
published script (github.com/GT-Vision-Lab/VQA, a013f00) included, since published figures are made with them. The accuracy
is `capfilt.tasks`'.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
"""What becomes nothing or a space. A colon, an apostrophe and a full stop are not among it."""

_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each form that lacks one of its apostrophes -> the form."""
    found = {
        form[:place] + form[place + 1 :]: form
        for form in _FORMS.split()
        for place, letter in enumerate(form)
        if letter == "'"
    }
    return found | {"somebody'd": "somebodyd"}  # so in the published table


CONTRACTIONS: Mapping[str, str] = _contractions()

_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIODS = 32  # the published script passes a flag where the number of replacements goes


def without_punctuation(answer: str) -> str:
    """The answer with punctuation removed, or made a space where it stands between two words.

    Decided once per sign for the whole answer: it is removed where a space stands beside it anywhere, or where a comma
    stands between two digits anywhere ("10,000"). A full stop is removed unless a digit follows it ("3.5", ".5").
    """
    out = answer
    numeric = _DIGIT_COMMA_DIGIT.search(answer) is not None
    for sign in PUNCTUATION:
        if sign in out:
            out = out.replace(sign, "" if numeric or f"{sign} " in answer or f" {sign}" in answer else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def stripped(answer: str) -> str:
    """The answer with its letters and signs as they are: line breaks and tabs made spaces, none left around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalised(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, numbers up to ten as digits, contractions repaired."""
    words = (DIGITS.get(word, word) for word in without_punctuation(stripped(answer)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


_CLOSED = (
    # Between digits ("10:30", "3.5", "1/2"); a comma before three of them, for "1, 2" is a list.
    (re.compile(r"(?<=\d) ?([:./]) (?=\d)"), r"\1"),
    (re.compile(r"(?<=\d) ?, ?(?=\d{3}(?!\d))"), ","),
    # Between words or digits ("t-shirt", "black/white"), and before or behind a number ("$5", "#7", "-3", ".5", "50%", "6'").
    (re.compile(r"(?<=\w) ([-/]) (?=\w)"), r"\1"),
    (re.compile(r"([$£€#]) (?=\.? ?\d)"), r"\1"),
    (re.compile(r"^([-+.]|[$£€#]\.) (?=\d)"), r"\1"),
    (re.compile(r"(?<=\d) (?=[%'\"°](?: |$))"), ""),
    # Letters with points ("p.m.", "u.s.a."), and what ends a word.
    (re.compile(r"(?<=\b[^\W\d]) \. (?=[^\W\d]\b(?: \.|$))"), "."),
    (re.compile(r" (?=[.!;)](?: |$))"), ""),
    (re.compile(r"\( "), "("),
)


def closed_up(answer: str) -> str:
    """A decoded answer as people write it: a tokenizer sets every sign apart ("10 : 30", "t - shirt", "$ 5", "50 %").

    Where all annotators agree spellings are compared, and where not "3 . 5" would lose its point and "10 : 30" stay wrong.
    """
    for spaced, close in _CLOSED:
        answer = spaced.sub(close, answer)
    return answer


LEAST_ANNOTATORS = 4
"""With fewer nobody's answer can reach 1 in the leave-one-out form, so there a given answer is simply right."""


def soft_score(given: int, annotators: int) -> float:
    """What an answer is worth that `given` of the `annotators` gave, in [0, 1].

    The mean, over the annotators left out in turn, of min(how many of the others gave it / 3, 1): 0, 0.3, 0.6, 0.9 and 1
    for 0, 1, 2, 3 and 4 or more of ten. With fewer than `LEAST_ANNOTATORS`, 1 for any answer that was given.
    """
    if annotators < LEAST_ANNOTATORS:
        return float(given > 0)
    left_out = given * min((given - 1) / 3, 1.0) + (annotators - given) * min(given / 3, 1.0)
    return left_out / annotators


def closed_list(questions: Sequence[Sequence[tuple[str, int]]], least: int = 9) -> tuple[str, ...]:
    """The answers a closed set knows, the most frequent first; each stands for all answers of its normal form.

    They are spelled as most people spell them ("t-shirt", not "t shirt"): where all annotators agree the official accuracy
    compares spellings, and an answer that is written or ranked is learned so.

    questions: each question's answers with how many gave them. least: an answer must be the most frequent one of so many
    questions (ViLT, arXiv 2102.03334, code: 9, which makes 3,129 of VQA v2's train and val).
    """
    best: Counter[str] = Counter()
    for answers in questions:
        counts = merged(answers)
        if counts:
            best[max(counts, key=lambda answer: counts[answer])] += 1
    kept = [answer for answer, count in best.items() if count >= least]
    spelled = spellings(questions)
    return tuple(spelled[answer] for answer in sorted(kept, key=lambda answer: (-best[answer], answer)))


def spellings(questions: Iterable[Sequence[tuple[str, int]]]) -> dict[str, str]:
    """How most people spell the answers of each normal form; the first in the alphabet of equals."""
    counts: dict[str, Counter[str]] = {}
    for answer, count in (each for answers in questions for each in answers):
        counts.setdefault(normalised(answer), Counter())[stripped(answer)] += count
    return {
        form: min(written, key=lambda spelling: (-written[spelling], spelling))
        for form, written in counts.items()
    }


def soft_targets(
    answers: Sequence[tuple[str, int]], places: Mapping[str, int]
) -> tuple[tuple[int, float], ...]:
    """(place, worth) of the answers that `places` (normal form -> place) knows, for a classifier to learn."""
    counts = merged(answers)
    total = sum(counts.values())
    return tuple(
        (places[answer], soft_score(count, total)) for answer, count in counts.items() if answer in places
    )


def merged(answers: Iterable[tuple[str, int]]) -> dict[str, int]:
    """How many gave each answer, answers of one normal form together; those that come to nothing are left out."""
    counts: dict[str, int] = {}
    for answer, count in answers:
        form = normalised(answer)
        if form and count > 0:
            counts[form] = counts.get(form, 0) + count
    return counts
