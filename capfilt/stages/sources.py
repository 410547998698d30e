"""The rows that a training learns from: pairs of a picture and a text, either alone, or a task's examples.

Which rows make a batch is decided in `capfilt/data/`. Not here: where the model comes from (`starts.py`), the training
(`training.py`).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch

from capfilt.data.loader import Batch
from capfilt.data.pair_shards import PROBABILITIES, PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.rows import EXAMPLE_ROWS, IMAGE_ROWS, PAIR_ROWS, TEXT_ROWS
from capfilt.data.several import Several, StepBatch
from capfilt.data.store import MEMORY_LIMIT
from capfilt.data.task_corpus import NEEDED, TaskCorpus, from_examples, task_batches
from capfilt.errors import UserError
from capfilt.models import Model
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

PICTURE_COLUMNS = ("image_id", "image", "split")
LEFT_OUT = "leave-out"
"""`--dropped`: no picture stays whose texts were dropped."""
NAMED = 500_000
"""Texts named at a time, a row group each."""


class Data(Protocol):
    """Rows to train on, whatever they are."""

    def __len__(self) -> int: ...

    @property
    def skipped(self) -> Mapping[str, int]:
        """Rows left out for a fault, by reason."""

    @property
    def deselected(self) -> Mapping[str, int]:
        """Rows left out without a fault, by reason."""

    def batches(self, *given: Any, **options: Any) -> Iterator[Batch] | Iterator[StepBatch]:
        """This rank's share of batches, of a tokenizer and a batch size; options: `seed`, `steps`, `start_step`, `rank`,
        `world`, `parts`, `max_text_tokens`, `max_words`, `views`, and those of the source's `feed`.
        """


D = TypeVar("D", bound=Data)


class Source(ABC, Generic[D]):
    """Rows to train on.

    Attributes:
        rows: their kind, one of `capfilt.data.rows`; of several, those after one another.
        unit: their name in messages.
    """

    rows: str
    unit: str

    @abstractmethod
    def inputs(self) -> list[Part]:
        """Every part that is read."""

    @abstractmethod
    def outlook(self) -> str:
        """How many rows there are, in words."""

    @abstractmethod
    def data(self, size: int) -> D:
        """The rows, with pictures of this side."""

    def feed(self) -> dict[str, Any]:
        """Further options of the data's `batches`."""
        return {}

    def epoch(self, data: D) -> float:
        """How many rows an epoch has: all, or as many as their weights say."""
        return len(data)

    def exposed(self, data: D) -> int:
        """How many rows `named` names."""
        return len(data)

    def prepare(self, data: D, model: Model, where: torch.device) -> None:
        """Change the data for a model that is on its device, before the first batch."""

    @abstractmethod
    def account(self, data: D) -> dict[str, Any]:
        """Figures of the rows."""

    @abstractmethod
    def named(self, data: D) -> Iterator[pa.Table]:
        """Columns that name each row, in order, some rows at a time."""

    def held_out(
        self, model: Model, tokenizer: Any, size: int, **longest: Any
    ) -> tuple[int, Iterator[Batch]]:
        """(how many rows, their batches) that the finished model is judged on; 0 for none."""
        return 0, iter(())


class RowSource(Source[Pairs]):
    """Rows of parts of tables, of one kind; `pair_inputs` are the parts."""

    pair_inputs: list[PairInput]
    memory = MEMORY_LIMIT

    def __init__(self, options: Any) -> None:
        self.options = options
        cached = options.cache_features
        for name, wrong, why in (
            ("stream", options.stream and cached, "features are cached for pictures that are held"),
            ("shard", options.shard and cached, "features are cached by models that are whole"),
            ("randaugment", options.randaugment and cached, "features are cached of pictures as they are"),
        ):
            if wrong:
                raise UserError(f"--{name} and --cache-features: {why}")
        if options.loader_workers and not options.stream:
            raise UserError(f"--loader-workers {options.loader_workers}: only with --stream")
        self.dropped = getattr(options, "dropped", LEFT_OUT)
        if self.dropped != LEFT_OUT and not options.verdicts:
            raise UserError(f"--dropped {self.dropped}: verdicts alone say what was dropped; give --verdicts")
        if self.dropped == "soft" and not cached:
            raise UserError("--dropped soft: finds neighbours by the features of --cache-features; give both")

    def inputs(self) -> list[Part]:
        both = ((each.part, each.verdicts) for each in self.pair_inputs)
        return [part for part in itertools.chain(*both) if part is not None]

    def outlook(self) -> str:
        return f"{sum(part.rows for part in self.inputs()):,} images"

    def data(self, size: int) -> Pairs:
        o = self.options
        cache = 0 if o.stream else self.memory
        return Pairs(
            self.pair_inputs,
            size=size,
            rows=self.rows,
            cache=cache,
            workers=o.loader_workers,
            weights=o.weights,
            dropped=self.dropped != LEFT_OUT,
        )

    def epoch(self, data: Pairs) -> float:
        return data.drawn

    def prepare(self, data: Pairs, model: Model, where: torch.device) -> None:
        if not self.options.cache_features or self.rows == TEXT_ROWS:
            return
        tower: Any = getattr(model, "visual_encoder", None)
        if not getattr(tower, "frozen", False):
            raise UserError("--cache-features: only a frozen trunk has features to cache (--preset trunk)")
        data.with_features(lambda pixels: tower.trunk_features(pixels.to(where)))
        if self.dropped == "soft":
            data.with_neighbours()

    def account(self, data: Pairs) -> dict[str, Any]:
        pictures = {} if self.rows == TEXT_ROWS else {"images": data.pictures}
        texts = {} if self.rows == IMAGE_ROWS else {"texts": len(data)}
        return {**texts, **pictures, "by_source": data.texts_by_source()}

    def named(self, data: Pairs) -> Iterator[pa.Table]:
        texts = ((text.key, image_id, text.source) for image_id, text in data.identities())
        schema = pa.schema([(name, pa.string()) for name in ("text_id", "image_id", "source")])
        while some := list(itertools.islice(texts, NAMED)):
            yield pa.table(dict(zip(schema.names, zip(*some, strict=True), strict=True)), schema=schema)


class PairSource(RowSource):
    """Pairs of images parts (human and web), of pairs parts, and of images parts joined with verdicts."""

    rows, unit = PAIR_ROWS, "texts"

    def __init__(self, options: Any, workspace: Workspace, prompt: str = "") -> None:
        if not any(getattr(options, name, ()) for name in ("human", "web", "pairs", "verdicts")):
            raise UserError("give at least one part to train on (--human)")
        shares(options.mix)
        super().__init__(options)
        self.prompt = prompt
        self.human = [workspace.input("images", name).check() for name in options.human]
        self.web = [workspace.input("images", name).check() for name in getattr(options, "web", ())]
        self.pairs = [workspace.input("pairs", name).check() for name in getattr(options, "pairs", ())]
        self.joined: list[tuple[Part, Part]] = []
        for item in getattr(options, "verdicts", ()):
            images, equals, verdicts = item.partition("=")
            if not equals:
                raise UserError(f"--verdicts {item}: write IMAGES=VERDICTS, the names of two parts")
            rule = workspace.input("verdicts", verdicts).check()
            by = rule.info["identity"].get("options", {}).get("by", "")
            if self.dropped == "soft" and by not in PROBABILITIES:
                raise UserError(
                    f"--dropped soft: {rule.path} was decided by {by or 'no score'}; choose verdicts by {PROBABILITIES[0]}"
                )
            self.joined.append((workspace.input("images", images).check(), rule))

        whole = [PairInput(part) for part in (*self.human, *self.web, *self.pairs)]
        self.pair_inputs = [*whole, *(PairInput(images, verdicts) for images, verdicts in self.joined)]

    def feed(self) -> dict[str, Any]:
        most = {"synthetic": getattr(self.options, "synthetic_share", 1.0)}
        return {"prompt": self.prompt, "mixing": shares(self.options.mix), "most": most}


class AloneSource(RowSource):
    """Pictures alone, of images and pairs parts, or texts alone, of captions parts too."""

    def __init__(self, options: Any, workspace: Workspace, rows: str) -> None:
        super().__init__(options)
        self.rows, self.unit = rows, "pictures" if rows == IMAGE_ROWS else "texts"
        tables = ("images", "pairs", "captions")[: 2 if rows == IMAGE_ROWS else 3]
        names = getattr(options, rows)
        if not names:
            raise UserError(f"give at least one part of {rows} (--{rows})")
        self.pair_inputs = []
        for name in names:
            table, slash, rest = name.partition("/")
            found = (table, rest) if slash and table in tables else ("images", name)
            self.pair_inputs.append(PairInput(workspace.input(*found).check()))


class SeveralSource(Source[Several]):
    """Rows of several kinds, of a source each; every step has a batch of each kind."""

    def __init__(self, sources: Sequence[RowSource]) -> None:
        self.sources = {source.rows: source for source in sources}
        self.rows, self.unit = " and ".join(self.sources), "rows of each kind"
        for source in sources:
            source.memory = MEMORY_LIMIT // len(sources)

    def inputs(self) -> list[Part]:
        return [part for source in self.sources.values() for part in source.inputs()]

    def outlook(self) -> str:
        return ", ".join(f"{source.outlook()} for {rows}" for rows, source in self.sources.items())

    def data(self, size: int) -> Several:
        return Several({rows: source.data(size) for rows, source in self.sources.items()})

    def feed(self) -> dict[str, Any]:
        return {"feeds": {rows: source.feed() for rows, source in self.sources.items()}}

    def epoch(self, data: Several) -> float:
        rows, source = next(iter(self.sources.items()))
        return source.epoch(data.of[rows])

    def exposed(self, data: Several) -> int:
        return data.rows

    def prepare(self, data: Several, model: Model, where: torch.device) -> None:
        for rows, source in self.sources.items():
            source.prepare(data.of[rows], model, where)

    def account(self, data: Several) -> dict[str, Any]:
        return {rows: source.account(data.of[rows]) for rows, source in self.sources.items()}

    def named(self, data: Several) -> Iterator[pa.Table]:
        for rows, source in self.sources.items():
            for table in source.named(data.of[rows]):
                yield table.add_column(0, "rows", pa.array([rows] * table.num_rows))


def rows_source(rows: Sequence[str], options: Any, workspace: Workspace) -> Source[Any]:
    """The source of the kinds of rows that a family's model learns from."""
    sources = [
        PairSource(options, workspace) if each == PAIR_ROWS else AloneSource(options, workspace, each)
        for each in rows
    ]
    return sources[0] if len(sources) == 1 else SeveralSource(sources)


class ExampleSource(Source[TaskCorpus]):
    """A task's examples with their pictures.

    Args:
        options: the stage's.
        task: one of `capfilt.tables.contracts.TASKS`.
        pictures: how many pictures an example must have; 0 for as many as it has.
        classes: decides the classes from the training examples' answers; None where the task has its own.
        weights: by examples part, the weight of its answers, where that is not 1.
        swap: the chance of showing two pictures in the other order; None where there are not two.
    """

    rows, unit = EXAMPLE_ROWS, "examples"

    def __init__(
        self,
        options: Any,
        workspace: Workspace,
        task: str,
        pictures: int = 0,
        classes: Callable[[Sequence[Any]], tuple[str, ...]] | tuple[str, ...] | None = None,
        weights: Mapping[str, float] | None = None,
        swap: float | None = None,
    ) -> None:
        self.options, self.task, self.pictures, self.classes = options, task, pictures, classes
        self.weights, self.swap = weights or {}, swap
        for name in ("examples", "images"):
            if not getattr(options, name):
                raise UserError(f"give at least one part of {name} (--{name})")
        self.parts = {name: workspace.input("examples", name).check() for name in options.examples}
        self.images = [workspace.input("images", name).check() for name in options.images]

    def inputs(self) -> list[Part]:
        return [*self.parts.values(), *self.images]

    def outlook(self) -> str:
        return f"{sum(part.rows for part in self.parts.values()):,} examples"

    def data(self, size: int) -> TaskCorpus:
        corpus = self._corpus(size, (*self.options.splits, None))
        if not len(corpus):
            raise UserError(
                f"no examples of the task {self.task} to train on in "
                f"{', '.join(str(part.path) for part in self.parts.values())} "
                f"(left out: {corpus.skipped | corpus.deselected})"
            )
        given = set(corpus.example_ids)
        for part in self.parts.values():
            ids = (table["example_id"].to_pylist() for table in part.tables(["example_id"]))
            if all(given.isdisjoint(some) for some in ids):
                raise UserError(
                    f"{part.path}: gives no example of the task {self.task} to train on; name another part, or leave it out"
                )
        return corpus

    def feed(self) -> dict[str, Any]:
        return {} if self.swap is None else {"swap": self.swap}

    def account(self, data: TaskCorpus) -> dict[str, Any]:
        return {"examples": len(data), "images": len(data.image_ids)}

    def named(self, data: TaskCorpus) -> Iterator[pa.Table]:
        yield pa.table({"example_id": data.example_ids})

    def held_out(
        self, model: Model, tokenizer: Any, size: int, **longest: Any
    ) -> tuple[int, Iterator[Batch]]:
        o = self.options
        if not o.validate or "val" in o.splits:
            return 0, iter(())
        corpus = self._corpus(size, ("val",), o.validate, model)
        if not len(corpus):
            return 0, iter(())
        return len(corpus), task_batches(corpus, tokenizer, o.batch_size, epochs=1, **longest)

    def _corpus(
        self, size: int, splits: tuple[str | None, ...], limit: int = 0, model: Model = None
    ) -> TaskCorpus:
        reading: dict[str, Any] = {"pictures": self.pictures} if self.pictures else {}
        if self.classes is not None:
            reading["classes"] = self.classes if model is None else model.labels
        return from_examples(
            (
                (table, self.weights.get(name, 1.0))
                for name, part in self.parts.items()
                for table in part.tables((*NEEDED, "split"))
            ),
            (table for part in self.images for table in part.tables(PICTURE_COLUMNS)),
            self.task,
            splits,
            size=size,
            limit=limit,
            training=True,
            **reading,
        )


def shares(mix: Sequence[str]) -> dict[str, float] | None:
    """`--mix SOURCE=WEIGHT ...` as the loader takes it; None where nothing is given. Raises UserError."""
    found: dict[str, float] = {}
    for item in mix:
        source, equals, weight = item.partition("=")
        try:
            found[source] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not source or not 0 <= found[source] < math.inf:
            raise UserError(
                f"--mix {item}: write SOURCE=WEIGHT, as in human=1, the weight a finite number of 0 or more"
            )
    return found or None
