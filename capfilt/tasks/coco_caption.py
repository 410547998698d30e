"""Captioning's figures as coco-caption itself computes them: the pycocoevalcap package (extra `eval`), Java parts included.

What lives here: calling its scorers, and saying by name which of them cannot run here. What does not: the same figures
without Java (`captioning`), which cover all but METEOR and SPICE.

Nothing is ever downloaded. pycocoevalcap brings the tokenizer's and METEOR's jars; SPICE's two Stanford models it would
fetch at first use, so SPICE runs only where somebody has put them into its `spice/lib`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt.errors import UserError
from capfilt.tasks.captioning import tokenize

Floats = NDArray[np.float64]

_JAVAS = ("meteor", "spice")
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True)
class CocoFigures:
    """What the package's scorers said of one caption per image, all x100.

    `metrics` is flat: `bleu@1 .. bleu@4`, `meteor`, `rouge_l`, `cider`, `spice`, less what was skipped. `per_image` has
    float64 [images] of those that are means over images (`rouge_l`, `cider`, `spice`). `skipped` says why, by metric.
    `tokens` is what was judged: each candidate's tokens, and each image's references'. `tokenizer` names who cut them.
    """

    metrics: dict[str, float]
    per_image: dict[str, Floats]
    skipped: dict[str, str]
    tokens: tuple[list[list[str]], list[list[list[str]]]]
    tokenizer: str


def coco_figures(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CocoFigures:
    """pycocoevalcap on captions [images] and each image's references.

    Without a Java that works, tokens are those of `captioning.tokenize`, and METEOR and SPICE are skipped. Raises UserError
    where the package is not installed.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError(
            "--caption-scorer pycocoevalcap: the package is not installed; pip install 'capfilt[eval]', or use "
            "--caption-scorer capfilt, which has all but METEOR and SPICE"
        )
    skipped, who = _unable(shutil.which("java")), "Stanford's PTBTokenizer"
    if "meteor" in skipped:
        candidates, options = _own_tokens(captions, references)
        who = "capfilt's tokens, for there is no Java"
    else:
        try:
            candidates, options = _tokens(captions, references)
        except (OSError, ValueError) as error:
            candidates, options = _own_tokens(captions, references)
            who = "capfilt's tokens, for Java's tokenizer failed"
            skipped = dict.fromkeys(_JAVAS, f"Java's tokenizer failed: {error}".splitlines()[0])
    gts = {image: [" ".join(each) for each in texts] for image, texts in enumerate(options)}
    res = {image: [" ".join(tokens)] for image, tokens in enumerate(candidates)}
    metrics: dict[str, float] = {}
    per_image: dict[str, Floats] = {}
    for name in ("bleu", "meteor", "rouge_l", "cider", "spice"):
        if name in skipped:
            continue
        try:
            score, single = _scored(name, gts, res)
        except Exception as error:  # noqa: BLE001  a Java program fails in as many ways as there are machines
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if name == "bleu":
            metrics |= {f"bleu@{n}": 100.0 * float(value) for n, value in enumerate(score, start=1)}
            continue
        metrics[name] = 100.0 * float(score)
        if name in ("rouge_l", "cider"):
            per_image[name] = 100.0 * np.asarray(single, dtype=np.float64)
        elif name == "spice":
            per_image[name] = 100.0 * np.array([each["All"]["f"] for each in single], dtype=np.float64)
    return CocoFigures(metrics, per_image, skipped, (candidates, options), who)


def _unable(java: str | None) -> dict[str, str]:
    """Why a metric cannot be had here, by metric."""
    if java is None:
        return dict.fromkeys(_JAVAS, "there is no `java` on the PATH")
    place = _package() / "spice" / "lib"
    lacking = [name for name in SPICE_MODELS if not (place / name).is_file()]
    if lacking:
        return {"spice": f"{place} lacks {' and '.join(lacking)}, and capfilt downloads nothing"}
    return {}


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or [])))


@contextlib.contextmanager
def _english_java() -> Iterator[None]:
    """Java started in here writes and reads numbers with a point, whatever the machine's language."""
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Duser.language=en -Duser.country=US".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = before


def _scored(name: str, gts: dict[int, list[str]], res: dict[int, list[str]]) -> tuple[Any, Any]:
    with contextlib.redirect_stdout(io.StringIO()), _english_java():
        if name == "bleu":
            from pycocoevalcap.bleu.bleu import Bleu

            return Bleu(4).compute_score(gts, res, verbose=0)  # type: ignore[no-any-return]
        if name == "rouge_l":
            from pycocoevalcap.rouge.rouge import Rouge

            return Rouge().compute_score(gts, res)  # type: ignore[no-any-return]
        if name == "cider":
            from pycocoevalcap.cider.cider import Cider

            return Cider().compute_score(gts, res)  # type: ignore[no-any-return]
        if name == "meteor":
            from pycocoevalcap.meteor.meteor import Meteor

            scorer = Meteor()
            try:
                return scorer.compute_score(gts, res)  # type: ignore[no-any-return]
            finally:
                # Its own lock, which it keeps where it fails, and waits for when it is thrown away.
                if scorer.lock.locked():
                    scorer.lock.release()
                scorer.meteor_p.kill()
                scorer.meteor_p.wait()
                for pipe in (scorer.meteor_p.stdin, scorer.meteor_p.stdout, scorer.meteor_p.stderr):
                    # What was never sent cannot be any more.
                    with contextlib.suppress(OSError):
                        pipe.close()
        from pycocoevalcap.spice.spice import Spice

        return Spice().compute_score(gts, res)  # type: ignore[no-any-return]


Tokens = tuple[list[list[str]], list[list[list[str]]]]


def _own_tokens(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tokens:
    return [tokenize(text) for text in captions], [[tokenize(text) for text in image] for image in references]


def _tokens(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tokens:
    """Tokens of the package's PTBTokenizer, of candidates and of each image's references.

    Raises ValueError where it gave other numbers of texts than it got, or no word of any: its Java has failed.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def cut(texts: dict[int, list[str]]) -> dict[int, list[str]]:
        # A line per text is what the Java program counts on.
        plain = {key: [{"caption": " ".join(text.split())} for text in each] for key, each in texts.items()}
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _english_java(),
        ):
            found: dict[int, list[str]] = PTBTokenizer().tokenize(plain)
        asked, given = sum(map(len, texts.values())), sum(map(len, found.values()))
        words = any(tokenize(text) for each in texts.values() for text in each)
        if given != asked or (words and not any(text for each in found.values() for text in each)):
            raise ValueError(f"{asked} texts in, {given if given != asked else 'nothing but empty ones'} out")
        return found

    ours = cut({image: [text] for image, text in enumerate(captions)})
    theirs = cut({image: list(texts) for image, texts in enumerate(references)})
    return (
        [ours[image][0].split() for image in range(len(captions))],
        [[text.split() for text in theirs[image]] for image in range(len(references))],
    )
