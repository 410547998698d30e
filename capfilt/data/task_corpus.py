"""Rows of examples tables to batches: questions with their answers, texts about one picture or two with their labels, pictures
with their classes.

Held in memory, in the order of `loader.Plan`: a pure function of (corpus,
options, seed, step). What cannot be trained on is left out and counted, never raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from capfilt.data.answers import normalised, soft_targets
from capfilt.data.cleaning import MAX_WORDS, clean
from capfilt.data.examples import TRAINING_SPLITS, slices
from capfilt.data.loader import Batch, Plan, TokenTable, ahead, share
from capfilt.data.pictures import BuildOptions, Pictures
from capfilt.data.store import Index, Rows, cpu_workers
from capfilt.data.tokenizer import Encodes
from capfilt.data.transforms import Views, mentions_sides, swap_left_right
from capfilt.tables.contracts import LABELS

PICTURES = {"vqa": 1, "nlvr": 2, "entailment": 1, "classification": 1}
"""How many pictures a model of the task looks at, of the tasks that are trained on."""

Answers = tuple[tuple[str, int], ...]
"""The answers to a question, each with how many annotators gave it."""

NEEDED = ("example_id", "task", "image_ids", "text", "answers", "label", "failure")


@dataclass
class TaskBatch(Batch):
    """B examples. Beside what every batch has, and where it differs:

    Attributes:
        image_index: int64 [B] or, for pairs, [B, 2].
        text_index: int64 [B], the same as `example`.
        weight: float32 [B], ones.
        sided: bool [B], True where the text or an answer names left or right.
        pixels: uint8 [B, 3, S, S], or [B, 2, 3, S, S] for pairs.
        answer_ids, answer_mask: int64 and bool [B, A, L]: [CLS] answer [SEP]; a question has up to A answers.
        answer_weight: float32 [B, A], 0 where there is no further answer.
        label: int64 [B], the place of the label in `contracts.LABELS`, or among the corpus' classes; -1 where there is none.
        targets: float32 [B, C], what each answer of a closed list is worth, in [0, 1]; None without one.
    """

    answer_ids: Tensor | None = None
    answer_mask: Tensor | None = None
    answer_weight: Tensor | None = None
    label: Tensor | None = None
    targets: Tensor | None = None


@dataclass
class TaskCorpus:
    """E examples of one task over N pictures, by column.

    Attributes:
        task: one of `PICTURES`.
        images: pixels of the pictures, uint8 [3, S, S] each.
        pictures: int64 [E, 1 or 2], the rows in `images` of each example's pictures; an example with one picture shows a
            model of pairs that one twice.
        image_ids: N strings.
        example_ids, texts: E strings each; texts as found, "" where the task has none (classification).
        answers: each example's answers with their weights.
        annotated: each example's answers with how many annotators gave them.
        labels: int64 [E], places in `contracts.LABELS` or, of a classification, in `classes`; -1 where there is none.
        classes: the closed list of answers (vqa) or the classes (classification), in the order of a classifier's outputs;
            empty without them.
        targets: (place in `classes`, worth in [0, 1]) of each question's answers that are on a closed list; empty without one.
        skipped: how many were left out for a fault: pictures by their failure (once per picture), examples by theirs,
            by `no_image` where a picture cannot be used, and by `empty_text`.
        deselected: how many were left out without a fault: as `split`, `task`, `no_answer`, `no_label`, `pictures`,
            `unlisted` (its class, or all of its answers, are not among the classes), `limit`.
    """

    task: str
    images: Rows
    pictures: Index
    image_ids: list[str]
    example_ids: list[str]
    texts: list[str]
    answers: list[tuple[tuple[str, float], ...]]
    labels: Index
    annotated: list[Answers] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    targets: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    deselected: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.example_ids)
        for name in ("pictures", "texts", "answers", "labels"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} examples")

    def __len__(self) -> int:
        return len(self.example_ids)

    def batches(self, tokenizer: Encodes, batch_size: int, **options: Any) -> Iterator[TaskBatch]:
        """`task_batches` of this corpus."""
        return task_batches(self, tokenizer, batch_size, **options)

    @property
    def paired(self) -> npt.NDArray[np.bool_]:
        """bool [E], True where an example has two pictures of its own."""
        found: npt.NDArray[np.bool_] = self.pictures[:, 0] != self.pictures[:, -1]
        return found


def from_examples(
    example_tables: Iterable[tuple[pa.Table, float]],
    image_tables: Iterable[pa.Table],
    task: str,
    splits: Sequence[str | None] | None = TRAINING_SPLITS,
    *,
    size: int,
    limit: int = 0,
    pictures: int = 0,
    classes: Callable[[Sequence[Answers]], Sequence[str]] | Sequence[str] = (),
    **options: Unpack[BuildOptions],
) -> TaskCorpus:
    """The examples of one task that can be trained on.

    Args:
        example_tables: Arrow tables with the columns of the examples contract, each with a factor for its answers'
            weights (ALBEF and BLIP take Visual Genome's at less than VQA v2's); read first and held.
        image_tables: Arrow tables with the columns of the images contract; read one at a time.
        task: one of `PICTURES`; a vqa example needs an answer, another one a label, and all but a classification a text.
        splits: only examples of these splits, None meaning rows without one; all where the argument is None.
        size: side of the pictures in pixels.
        limit: only so many of them, a sample that is always the same; 0 for all.
        pictures: how many the model looks at; 0 for the task's. Examples with more are left out.
        classes: the closed list of answers, for a classifier of questions: a list, or what makes one of the answers to
            the questions that were chosen (`answers.closed_list`). Questions without an answer on a list that is made
            are left out; on one that is given they have no targets, as they should where a model is judged. Of a
            classification, the classes; those of the chosen examples, by name, where none are given.
        **options: as in `corpus.from_images`; `progress` is called with numbers of image rows.

    An answer's weight is its share of the question's annotators (BLIP, released code) times the factor. Raises UserError
    for a column that is missing or wrong, RunError for a full disk.
    """
    if task not in PICTURES:
        raise ValueError(f"task {task!r} is none of {', '.join(PICTURES)}")
    looks_at = pictures or PICTURES[task]
    skipped: Counter[str] = Counter()
    deselected: Counter[str] = Counter()
    chosen = [
        (row, factor)
        for table, factor in example_tables
        for rows in slices([table], "examples", NEEDED, ("split",))
        for row in rows
        if _chosen(row, task, looks_at, splits, skipped, deselected)
    ]
    known = tuple(classes([counted(row) for row, _ in chosen]) if callable(classes) else classes)
    if task == "classification":
        known = known or tuple(sorted({row["label"] for row, _ in chosen}))
    # Of questions, a class stands for every answer of its normal form.
    form = normalised if task == "vqa" else str
    place_of = {form(name): place for place, name in enumerate(known)}
    if callable(classes) or task == "classification":
        listed = [
            each
            for each in chosen
            if (
                each[0]["label"] in place_of
                if task == "classification"
                else soft_targets(counted(each[0]), place_of)
            )
        ]
        deselected["unlisted"] = len(chosen) - len(listed)
        chosen = listed
    if limit and len(chosen) > limit:
        # Ids are hashes, so the smallest are a random sample.
        deselected["limit"] = len(chosen) - limit
        chosen = sorted(chosen, key=lambda each: str(each[0]["example_id"]))[:limit]
    stored = Pictures(size, options, skipped)
    wanted = pa.array(sorted({key for row, _ in chosen for key in row["image_ids"]}), pa.string())
    progress = options.get("progress")
    for rows in slices(image_tables, "images", ("image_id", "image"), ("split",), wanted):
        stored.add(rows)
        if progress is not None:
            progress(len(rows))
    number = {label: place for place, label in enumerate(LABELS[task] or known)}
    kept, places = [], []
    for row, factor in chosen:
        found = [stored.row_of.get(key) for key in row["image_ids"]]
        here = [number for number in found if number is not None]
        if len(here) < len(found):
            skipped["no_image"] += 1
            continue
        kept.append((row, factor))
        places.append(here * (looks_at // len(here)))
    return TaskCorpus(
        task=task,
        images=stored.store,
        pictures=np.array(places, dtype=np.int64).reshape(len(kept), looks_at),
        image_ids=stored.image_ids,
        example_ids=[row["example_id"] for row, _ in kept],
        texts=[row["text"] or "" for row, _ in kept],
        answers=[_weighted(row, factor) for row, factor in kept],
        labels=np.array([number.get(row["label"], -1) for row, _ in kept], dtype=np.int64),
        annotated=[counted(row) for row, _ in kept],
        classes=known,
        targets=[soft_targets(counted(row), place_of) for row, _ in kept] if known and task == "vqa" else [],
        skipped={reason: count for reason, count in sorted(skipped.items()) if count},
        deselected={reason: count for reason, count in sorted(deselected.items()) if count},
    )


def _chosen(
    row: dict[str, Any],
    task: str,
    pictures: int,
    splits: Sequence[str | None] | None,
    skipped: Counter[str],
    deselected: Counter[str],
) -> bool:
    if row["failure"] is not None:
        skipped[row["failure"]] += 1
    elif row["task"] != task:
        deselected["task"] += 1
    elif splits is not None and row.get("split") not in splits:
        deselected["split"] += 1
    elif task != "classification" and (row["text"] is None or not clean(row["text"])):
        skipped["empty_text"] += 1
    elif not 1 <= len(row["image_ids"]) <= pictures:
        deselected["pictures"] += 1
    elif task == "vqa" and not _weighted(row, 1.0):
        deselected["no_answer"] += 1
    elif (task == "classification" and row["label"] is None) or (
        LABELS[task] and row["label"] not in LABELS[task]
    ):
        deselected["no_label"] += 1
    else:
        return True
    return False


def counted(row: dict[str, Any]) -> Answers:
    """The answers of a row with how many annotators gave each."""
    return tuple((each["answer"], each["count"]) for each in row["answers"] or () if each and each["count"])


def _weighted(row: dict[str, Any], factor: float) -> tuple[tuple[str, float], ...]:
    answers = counted(row)
    total = sum(count for _, count in answers)
    return tuple((answer, factor * count / total) for answer, count in answers if answer and answer.strip())


def task_batches(
    corpus: TaskCorpus,
    tokenizer: Encodes,
    batch_size: int,
    *,
    seed: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    start_step: int = 0,
    max_text_tokens: int,
    max_words: int | None = MAX_WORDS,
    max_answer_tokens: int = 20,
    swap: float = 0.0,
    views: Views | None = None,
    prefetch: int = 1,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
) -> Iterator[TaskBatch]:
    """Batches of examples, the same for the same arguments; see `loader.Plan` for the order.

    Args:
        corpus: the examples.
        tokenizer: makes the ids, of texts after `clean`, of answers as they are ("10:30" keeps its colon).
        batch_size, seed, epochs, steps: as in `Plan`.
        start_step: the first batch to yield; what comes before is neither decoded nor read.
        max_text_tokens, max_words: per text, as in `Pairs.batches` (BLIP's code: 50 words and 35 tokens of
            questions, whose punctuation it drops where `clean` makes it a space; 40 words of statements).
        max_answer_tokens: per answer, [CLS] and [SEP] included.
        swap: chance that an example with two pictures shows them in the other order, left and right exchanged in its text
            (BLIP, released code for NLVR2: 0.5).
        views: each picture's own view, of the stored square; all of it where None.
        prefetch: batches assembled ahead, in one thread.
        rank, world, parts: only this rank's share of every batch, as in `loader.share`.

    Raises UserError at once, not at the first batch, for what `Plan` refuses.
    """
    if start_step < 0:
        raise ValueError(f"start_step {start_step} is negative")
    count = len(corpus)
    plan = Plan(count, batch_size, seed=seed, epochs=epochs, steps=steps)
    paired = corpus.paired
    # Both orders' texts, the exchanged ones behind the others.
    spoken = corpus.texts + ([swap_left_right(text) for text in corpus.texts] if swap else [])
    table = TokenTable.build(spoken, tokenizer, max_text_tokens, "", max_words)
    written = [answer for answers in corpus.answers for answer, _ in answers]
    answer_table = TokenTable.build(written, tokenizer, max_answer_tokens, raw=True)
    first_answer = np.cumsum([0, *map(len, corpus.answers)])
    sided = np.array(
        [
            mentions_sides(text) or any(mentions_sides(answer) for answer, _ in answers)
            for text, answers in zip(corpus.texts, corpus.answers, strict=True)
        ],
        dtype=np.bool_,
    )

    decoders = ThreadPoolExecutor(cpu_workers(), thread_name_prefix="capfilt-views")

    def assemble(step: int) -> TaskBatch:
        rows = plan.rows(step)
        # Drawn per step, not in sequence: a resumed run must see what it would have seen.
        turned = (np.random.default_rng([seed, step, 2]).random(len(rows)) < swap) & paired[rows]
        mine = share(np.arange(len(rows)), rank, world, parts)
        rows, turned = rows[mine], turned[mine]
        shown = np.where(turned[:, None], corpus.pictures[rows, ::-1], corpus.pictures[rows])
        spoken_rows = rows + count * turned
        ids, mask = table.read(spoken_rows)
        keep = torch.from_numpy(sided[rows])
        squares = corpus.images.read(shown.reshape(-1))
        if views is not None:
            places = (mine[:, None] * shown.shape[1] + np.arange(shown.shape[1])).reshape(-1)
            sides = np.repeat(sided[rows], shown.shape[1])
            seen = decoders.map(
                lambda square, place, side: views.view(square.transpose(1, 2, 0), square.shape[1], step, place, side),
                squares, places.tolist(), sides.tolist(),
            )  # fmt: skip
            squares = np.stack(list(seen))
        pixels = torch.from_numpy(squares)
        index = torch.from_numpy(shown)
        if shown.shape[1] > 1:
            pixels = pixels.view(*shown.shape, *pixels.shape[1:])
        batch = TaskBatch(
            ids=ids,
            mask=mask,
            image_index=index if shown.shape[1] > 1 else index[:, 0],
            text_index=torch.from_numpy(rows),
            example=torch.from_numpy(rows),
            weight=None,
            sided=keep,
            texts=[spoken[row] for row in spoken_rows.tolist()],
            step=step,
            epoch=plan.epoch(step),
            pixels=pixels,
            label=torch.from_numpy(corpus.labels[rows]),
        )
        if corpus.targets:
            targets = torch.zeros(len(rows), len(corpus.classes))
            for number, row in enumerate(rows.tolist()):
                for place, worth in corpus.targets[row]:
                    targets[number, place] = worth
            batch.targets = targets
        elif corpus.task == "vqa":
            _add_answers(batch, corpus, rows, answer_table, first_answer)
        return batch

    return ahead(assemble, range(start_step, plan.steps), prefetch)


def _add_answers(
    batch: TaskBatch, corpus: TaskCorpus, rows: Index, table: TokenTable, first: npt.NDArray[np.int64]
) -> None:
    """Answers of each question side by side, as many as the question with the most has."""
    most = int((first[rows + 1] - first[rows]).max())
    places = first[rows][:, None] + np.arange(most)
    here = places < first[rows + 1][:, None]
    ids, mask = table.read(np.where(here, places, first[rows][:, None]).reshape(-1))
    weights = np.zeros(here.shape, dtype=np.float32)
    weights[here] = [weight for row in rows.tolist() for _, weight in corpus.answers[row]]
    batch.answer_ids = ids.view(*here.shape, -1)
    batch.answer_mask = mask.view(*here.shape, -1)
    batch.answer_weight = torch.from_numpy(weights)
