"""Which tasks there are: what each needs a model to be able to do, what it reads, and what evaluates it.

Light: nothing of a task is imported before it runs. The `evaluate` stage walks `TASKS` and knows no task by name; a task
is added here, a model in `adapters`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capfilt.errors import UserError

if TYPE_CHECKING:
    from capfilt.tasks.outcome import Outcome

CAPTIONS = "captions"
"""What a task reads that takes the texts of an images part; every other one names the task of its examples."""


class Unsuited(UserError):
    """The model, or the examples at hand, do not suit a task: an error where the task was named, else a task left out."""


Progress = Callable[[str, int, int], object]
"""Called with (what is done, how many of it are, of how many)."""


@dataclass(frozen=True)
class Task:
    """One task as `evaluate` sees it.

    Attributes:
        name: as in `--tasks`.
        about: what is asked of a model, in a few words.
        reads: `CAPTIONS`, or the task of the examples (`contracts.TASKS`).
        needs: names of capabilities (`capabilities.CAPABILITIES`); of each group one suffices, and each gives figures.
        headline: the figures that fit in a line.
        run: "module:function", called with (model, data, options, progress), which gives an `Outcome`: data is the
            `data.corpus.Corpus` or `data.example_set.ExampleSet` of what it reads, options are `EvaluateOptions`.
        further: "module:function", called with the options, which gives what else the figures depend on, such as a file.
        support: the split it also learns or tunes on, unless another is named; then `data.support` holds those examples.
        version: raised when the protocol changes its figures.
    """

    name: str
    about: str
    reads: str
    needs: tuple[tuple[str, ...], ...]
    headline: tuple[str, ...]
    run: str
    support: str = ""
    further: str = ""
    version: int = 1

    def possible(self, can: Sequence[str]) -> bool:
        """Whether a model with these capabilities can do it."""
        return all(any(name in can for name in group) for group in self.needs)

    def wants(self) -> str:
        """The capabilities it needs, in words."""
        return " and ".join(" or ".join(f"{name!r}" for name in group) for group in self.needs)

    def function(self) -> Callable[[Any, Any, Any, Progress], Outcome]:
        """What evaluates it."""
        found: Callable[..., Outcome] = pkgutil.resolve_name(self.run)
        return found

    def depends(self, options: Any) -> Any:
        """What its figures depend on beside options and inputs: JSON-able."""
        return pkgutil.resolve_name(self.further)(options) if self.further else None


EMBEDS, FEATURES, MATCHES = "embeds images and texts", "embeds images", "matches pairs"
GENERATES, ANSWERS, CLASSIFIES = "generates text", "answers questions", "classifies pairs"
_JUDGES = ((MATCHES, EMBEDS),)

TASKS = (
    Task(
        "retrieval",
        "the texts of an image and the image of a text, among all",
        CAPTIONS,
        ((EMBEDS, MATCHES),),
        ("tr@1", "ir@1", "r_mean"),
        "capfilt.tasks.evaluations:retrieval",
    ),
    Task(
        "captioning",
        "a caption, judged by those people wrote",
        CAPTIONS,
        ((GENERATES,),),
        ("bleu@4", "cider"),
        "capfilt.tasks.evaluations:captioning",
    ),
    Task(
        "zero-shot",
        "the class of an image, by the classes' names alone",
        "classification",
        ((EMBEDS,),),
        ("zero_shot_top1",),
        "capfilt.tasks.evaluations:zero_shot",
        further="capfilt.tasks.evaluations:chosen_prompts",
    ),
    Task(
        "few-shot",
        "the class of an image, from 1 to 16 examples per class",
        "classification",
        ((FEATURES,),),
        ("probe@16", "class_mean@16"),
        "capfilt.tasks.evaluations:few_shot",
        support="train",
    ),
    Task(
        "classification",
        "the class of an image, by a classifier trained for it",
        "classification",
        ((CLASSIFIES,),),
        ("classification_top1",),
        "capfilt.tasks.evaluations:trained_classes",
    ),
    Task(
        "match",
        "whether a text belongs to an image",
        "match",
        _JUDGES,
        ("match_auc_itm", "match_auc_itc"),
        "capfilt.tasks.evaluations:match",
        support="val",
    ),
    Task(
        "rating",
        "people's ratings of how well a text describes an image",
        "rating",
        _JUDGES,
        ("tau_c_itm", "tau_c_itc"),
        "capfilt.tasks.evaluations:rating",
        version=2,  # own captions are left out
    ),
    Task(
        "choice",
        "the right text of an image beside a hard wrong one",
        "choice",
        _JUDGES,
        ("choice_itm", "choice_itc"),
        "capfilt.tasks.evaluations:choice",
    ),
    Task(
        "vqa",
        "the answer to a question, as people gave it",
        "vqa",
        ((ANSWERS, CLASSIFIES),),
        (
            "vqa_written",
            "vqa_ranked",
            "vqa_closed",
            "vqa_written_exact",
            "vqa_ranked_exact",
            "vqa_closed_exact",
        ),
        "capfilt.tasks.answers:evaluate_vqa",
        further="capfilt.tasks.answers:depends",
    ),
    Task(
        "nlvr",
        "whether a statement is true of one picture or two",
        "nlvr",
        ((CLASSIFIES,),),
        ("nlvr_accuracy", "nlvr_consistency"),
        "capfilt.tasks.reasoning:evaluate_nlvr",
    ),
    Task(
        "entailment",
        "whether a picture entails a text, contradicts it, or neither",
        "entailment",
        ((CLASSIFIES,),),
        ("entailment_accuracy",),
        "capfilt.tasks.reasoning:evaluate_entailment",
    ),
)


def lacking(task: Task, can: Sequence[str], who: str) -> str:
    """Why a model with these capabilities cannot do a task, in words; "" where it can."""
    if task.possible(can):
        return ""
    return f"needs a model that {_plain(task.wants())}; {who} {_plain(_listed(can))}"


def chosen(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once, in their order."""
    by_name = {task.name: task for task in TASKS}
    return [by_name[name] for name in dict.fromkeys(names)]


def check(tasks: Sequence[Task], can: Sequence[str], who: str) -> None:
    """Raise UserError, one line, for the first task that a model with these capabilities cannot do."""
    for task in tasks:
        why = lacking(task, can, who)
        if why:
            able = [each.name for each in TASKS if each.possible(can)]
            raise UserError(
                f"--tasks {task.name}: {why}" + (f", which is enough for {', '.join(able)}" if able else "")
            )


def _listed(can: Sequence[str]) -> str:
    return " and ".join([", ".join(can[:-1]), can[-1]] if len(can) > 1 else can) or "does nothing of the kind"


def _plain(text: str) -> str:
    return text.replace("'", "")


def matrix() -> list[tuple[str, ...]]:
    """The tasks by the capabilities, as rows of a table with its head: needs, or one of (where another would do too)."""
    from capfilt.inference.capabilities import CAPABILITIES

    rows: list[tuple[str, ...]] = [("task", "asks for", *CAPABILITIES)]
    for task in TASKS:
        cells = []
        for name in CAPABILITIES:
            group = next((group for group in task.needs if name in group), ())
            cells.append("one of" if len(group) > 1 else "needs" if group else "")
        rows.append((task.name, task.about, *cells))
    return rows
