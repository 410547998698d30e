"""What a stage is: an object that says what it reads, and makes one output shard from the same-numbered input shards.

Scheduling, retries and progress are the business of `execution/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from capfilt.tables.contracts import Contract
from capfilt.tables.manifest import Counts, Manifest, Plan, Successor
from capfilt.tables.sealed import fingerprint
from capfilt.tables.shards import Part


@dataclass(frozen=True)
class Produced:
    """What `process` made of one shard: the rows to commit, and the account of the input rows.

    Attributes:
        table: the rows.
        counts: the account.
        stats: what else the shard's stats say; JSON-able.
        successor: where the rows are a further generation of a shard that stands.
        batch_size: where rows were computed in batches of another size than the options say; the manifest keeps it.
    """

    table: pa.Table
    counts: Counts
    stats: Mapping[str, Any] = field(default_factory=dict)
    successor: Successor | None = None
    batch_size: int = 0


class Tally(Protocol):
    """Adds up what a run's shards say about themselves, for people who watch."""

    def add(self, manifest: Manifest, stats: Mapping[str, Any]) -> None:
        """One more shard was committed."""

    def figures(self, seconds: float) -> Mapping[str, Any]:
        """For the line of progress, `seconds` after the start."""

    def lines(self, seconds: float) -> Sequence[str]:
        """For the end of the run."""


class ShardStage(ABC):
    """A stage that works shard by shard.

    It is pickled to workers before `setup`, so models are loaded there and never in `__init__`.

    Attributes:
        name: the stage's name, as in `capfilt NAME`.
        version: raised when the code changes the rows it makes; part of the fingerprint.
        contract: the table it writes.
        uses_gpu: whether a worker wants a GPU where there is one.
        rows_per_second: about how many a worker does on a processor; `--execution auto` judges by it.
        reads_manifests: whether `inputs` is a look at manifests, which may be looked at before and after the work.
        accounts: the input rows that its counts are of: images (or what the source lists), or texts.
        workers: how many workers share the shards; said by the executor before the stage goes to them.
        gaps: the incomplete parts that it reads by permission, by path; said by whoever builds the stage.
    """

    name: str
    version: int
    contract: Contract
    uses_gpu: ClassVar[bool] = False
    rows_per_second: ClassVar[float] = 2000.0
    reads_manifests: ClassVar[bool] = True
    accounts: str = "images"
    workers: int = 1
    gaps: Mapping[str, str] = MappingProxyType({})

    output: Part

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything the rows depend on beside input shards: options, input parts, checkpoints. JSON-able."""

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        """For each checkpoint or plug-in, by its mark in `identity`: how it was `given`, and its `layout`.

        For people who ask later what a mark stands for; no part of the fingerprint, for a checkpoint may move.
        """
        return {}

    @abstractmethod
    def shards(self) -> list[int]:
        """The numbers of the output's shards."""

    def inputs(self, shard: int) -> list[str]:
        """The hashes of the input shards that `shard` is made from."""
        return []

    def most_workers(self) -> int | None:
        """How many workers may share the shards; None for any number."""
        return None

    def setup(self) -> None:  # noqa: B027
        """Load what every shard needs (models); called once in each worker."""

    def teardown(self) -> None:  # noqa: B027
        """Let go of what `setup` took, where leaving it to the end of the process is not enough."""

    @abstractmethod
    def process(self, shard: int) -> Produced:
        """Make one shard. Faults of rows are rows with a failure; an exception here fails the shard."""

    def outputs(self) -> list[Part]:
        """The parts that it makes; none where it adds to a part that must stand."""
        return [self.output]

    def standing(self) -> list[Path]:
        """The folders of `outputs` that stand, whatever they were made from."""
        return [path for part in self.outputs() if part.exists for path in (part.path, part.record)]

    def finish(self) -> None:
        """At the end of every run, once its shards are committed."""
        self.output.finish()

    def renews(self, manifest: Manifest) -> bool:
        """Whether a shard that stands is to be made again, as its next generation."""
        return False

    def tally(self) -> Tally | None:
        """What to tell of a run beside its rows."""
        return None

    def remarks(self) -> Sequence[str]:
        """Lines on the part as it stands, for what its counts alone would let pass."""
        return ()

    def expected_rows(self, shard: int) -> int:
        """How many input rows `shard` is made from: those of the stage's `images` part, unless it says otherwise.

        0 where nobody knows.
        """
        images = getattr(self, "images", None)
        manifest = images.manifest(shard) if isinstance(images, Part) else None
        return manifest.rows if manifest else 0

    def plan(self) -> Plan | None:
        """The whole output: its shards are those that the `images` part has when it is whole, or `shards`.

        None where the part's record knows better.
        """
        images, shards = getattr(self, "images", None), self.shards()
        planned = images.planned if isinstance(images, Part) else shards
        known = self.reads_manifests and self.accounts == "images" and shards == planned
        return Plan(planned, sum(map(self.expected_rows, shards)) or None if known else None, self.gaps)

    def full_identity(self) -> Mapping[str, Any]:
        """`identity` and the version of the code."""
        return {"version": self.version, **self.identity()}

    def begin(self) -> str:
        """Create or continue the output part. Returns its fingerprint. Raises UserError on another identity."""
        return self.output.begin(self.contract, self.name, self.full_identity(), self.origins(), self.plan())

    def shard_fingerprint(self, part: str, shard: int) -> str:
        """The fingerprint of one shard: the part's, and the bytes it is made from."""
        return fingerprint({"part": part, "shard": shard, "inputs": self.inputs(shard)})


Report = Callable[[int, int, Mapping[str, Any]], bool | None]
"""Called with the number of steps done, how many there are, and the latest figures; True asks the stage to stop."""


class ModelStage(ABC):
    """A stage from parts to a checkpoint directory, or to one result file. It runs as one piece of work."""

    name: ClassVar[str]
    version: ClassVar[int]
    unit: ClassVar[str] = "steps"
    gaps: Mapping[str, str] = MappingProxyType({})

    output: Path

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything the result depends on: options, digests of input parts, checkpoints. JSON-able."""

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        """As `ShardStage.origins`."""
        return {}

    def fingerprint(self) -> str:
        return fingerprint({"stage": self.name, "version": self.version, **self.identity()})

    @abstractmethod
    def outlook(self) -> str:
        """What `run` would do, in words."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the output stands. Raises UserError when it was made with another identity."""

    def standing(self) -> list[Path]:
        """The files and folders of the output that stand, whatever they were made from; only such as capfilt wrote."""
        return []

    def ranks(self, gpus: int) -> int:
        """In how many processes `run` is called, all at once, with torchrun's environment, where there are `gpus` for it.

        The first one reports, writes, and has the figures.
        """
        return 1

    def saves(self) -> bool:
        """Whether `run`, asked by its `report` to stop, saves what it has done and raises `Interrupted`."""
        return False

    def remarks(self) -> Sequence[str]:
        """As `ShardStage.remarks`, on the output that stands."""
        return ()

    def forewarning(self) -> Sequence[str]:
        """Lines on what the output will not be fit for, said before `run`."""
        return ()

    @abstractmethod
    def run(self, report: Report) -> Mapping[str, Any]:
        """Do the work and publish the result. Returns figures for the summary."""


def option_values(options: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options that decide what comes out, as JSON-able values; names of inputs and outputs are left out, and so is
    what options.py marks as `told`, or as `later` and has its default.
    """
    values = asdict(options)
    for name, description in type(options).__dataclass_fields__.items():
        marks = description.metadata
        unchanged = marks.get("later") and values[name] == description.default
        if marks.get("kind") or marks.get("told") or unchanged or name in ("out", *without):
            values.pop(name, None)
    return {name: str(value) if value == float("inf") else value for name, value in values.items()}
