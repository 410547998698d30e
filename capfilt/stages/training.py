"""A stage that trains: the checks of its options, the settings of the loop, the files of its checkpoint.

A checkpoint directory holds `config.json` (written last), `model.safetensors`, `tokenizer.json`, `log.jsonl` (learning
curves) and `exposures.parquet` (how often each row was trained on); where options ask for them, `live/` (the weights that were
not averaged) and `best/` (those of the lowest training loss) are checkpoints of their own.
Not here: the rows (`sources.py`), the model that a training starts from (`starts.py`), the losses of each stage (`train.py`,
`task_training.py`), the loop itself (`capfilt.training`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from capfilt.data.tokenizer import Encodes
from capfilt.data.transforms import Views
from capfilt.errors import MissingInput, UserError
from capfilt.models import Model, build, checkpoint, family_of, kind_of
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.export import homes, places
from capfilt.stages.base import ModelStage, Report, option_values
from capfilt.stages.remembering import remembering
from capfilt.stages.sources import Source
from capfilt.stages.starts import Start, frozen
from capfilt.stages.training_options import LoopOptions
from capfilt.tables.publish import publish_new
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.training import distributed, state
from capfilt.training.average import swapped
from capfilt.training.log import check_tensorboard
from capfilt.training.loop import TrainConfig, train
from capfilt.training.schedule import BY_STEP

LOG_EVERY = 20
EXPOSURES = "exposures.parquet"
STATE = "state.safetensors"


class Train(ModelStage):
    """A training: rows of a source, a model from a start, the losses of an objective.

    A stage that trains is a class of its own which makes the source and the start, and says which losses.

    Attributes:
        least: the smallest micro-batch that can be learned from.
        shown: figures of the loop that progress and summary show.
        source: the rows.
        start: the model that it starts from.
        objective: puts the model under its losses, as `capfilt.models.family.Family` has it.
    """

    version = 3  # crops are the same on any number of ranks, of pairs the order too, held or streamed
    least: ClassVar[int] = 1
    shown: tuple[str, ...]
    source: Source[Any]
    start: Start
    objective: Callable[[Any, Any, Any, Ranks], Any]

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        self.output = output.path if output else workspace.model(options.out)
        if not (options.steps or options.epochs):
            raise UserError("--steps, or --epochs, must be above 0")
        if options.batch_size < self.least:
            why = ": contrast and hard negatives need at least 2" if self.least > 1 else ": give 1 or more"
            raise UserError(f"--batch-size {options.batch_size}{why}")
        if options.micro_batch and options.accumulate != 1:
            raise UserError(
                f"--micro-batch {options.micro_batch}, --accumulate {options.accumulate}: give one of them; the other follows"
            )
        # A batch of 97 in equal parts of at most 90 would be 97 parts of one.
        smallest = max(self.least, min(options.micro_batch, options.batch_size) // 2)
        if options.micro_batch and options.batch_size // self._passes() < smallest:
            raise UserError(
                f"--micro-batch {options.micro_batch}: {options.batch_size} texts do not divide into equal parts of "
                f"{smallest} to {options.micro_batch}; change one of the two"
            )
        if options.batch_size // options.accumulate < self.least:
            raise UserError(
                f"--accumulate {options.accumulate}: {options.batch_size} texts do not make so many micro-batches of at "
                f"least {self.least}"
            )
        if options.shard and options.ranks == 1:
            raise UserError(f"--ranks {options.ranks}: with --shard, more than 1")
        if options.randaugment and not options.augment:
            raise UserError("--randaugment changes pictures: it needs --augment, and no --cache-features")
        if options.tensorboard:
            check_tensorboard()

    def compose(self, start: Callable[[], Start], source: Callable[[], Source[Any]]) -> None:
        """Make the model and the rows of this training. UserError for a part to freeze that the model has not.

        A wrong option of either is told before an input of the other is missed that an earlier step makes.
        """
        missed = None
        try:
            self.start = start()
            kind = self.start.becomes() if self.options.freeze else self.start.kind
            for part in self.options.freeze:
                if part not in kind.parts:
                    raise UserError(
                        f"--freeze {part}: {kind.one} has no such part; choose {', '.join(kind.parts)}"
                    )
        except MissingInput as error:
            missed = error
        self.source = source()
        if missed is not None:
            raise missed

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        """The model with its losses. UserError naming a method that they lack."""
        made: torch.nn.Module = self.objective(model, tokenizer, self.options, ranks)
        for name in ("losses", "blocks"):
            if not hasattr(made, name):
                family = family_of(type(model)).name
                raise UserError(f"model family {family}: {type(made).__name__} has no {name}")
        return made

    def planned(self) -> Any:
        """The config of the model to come, as far as it is known before any rows are read; None where nothing is."""
        return self.start.planned()

    def initial(self, data: Any) -> tuple[Model, Any]:
        """The model to train, and its tokenizer."""
        return self.start.initial(data)

    def prepare(self, data: Any, model: Any, where: torch.device) -> None:
        """Whatever is to do before the first batch, when the model is on its device."""
        self.source.prepare(data, model, where)

    @staticmethod
    def longest(model: Model) -> dict[str, Any]:
        """The longest texts of a model under training, as `batches` is told; nothing where it reads none."""
        if "text" not in model.config.sides():
            return {}
        return {
            "max_text_tokens": model.config.max_text_tokens,
            "max_words": model.config.max_words or None,
        }

    @torch.no_grad()
    def judged(self, model: Any, tokenizer: Any, where: torch.device) -> dict[str, float]:
        """Figures of the finished model on rows that were held out, on rank 0."""
        count, batches = self.source.held_out(model, tokenizer, self.start.image_size, **self.longest(model))
        if not count:
            return {}
        module = self.module(model.to(where), tokenizer, ALONE).eval()
        totals = {"loss": 0.0, "accuracy": 0.0}
        for batch in batches:
            found = module.losses(batch.to(where))  # type: ignore[operator]
            for name in totals:
                totals[name] += float(found[name]) * len(batch) / count
        return {f"val_{self.source.unit}": count, **{f"val_{name}": value for name, value in totals.items()}}

    def forewarning(self) -> list[str]:
        config = self.planned()
        found = places(config) if config is not None else {}
        return [] if None in found.values() else homes(self.options.out, found)

    def remarks(self) -> list[str]:
        config = checkpoint.shape_of(self.output)
        found = places(config, kind_of(config).tokenizer.load(self.output))
        return homes(self.options.out, found)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=("save_every",)),
            "inputs": {str(index): part.digest() for index, part in enumerate(self.source.inputs())},
            **self.start.identity(),
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return self.start.origins()

    def done(self) -> bool:
        if not (self.output / checkpoint.CONFIG).is_file():
            return False
        made = checkpoint.read_config(self.output).get("extra", {})
        if made.get("fingerprint") != self.fingerprint():
            change = _changed(made.get("identity", {}), dict(self.identity()))
            other = (
                f"with other options or inputs{change}"
                if change
                else "by another version of this stage's code"
            )
            raise UserError(
                f"{self.output}: holds a checkpoint made {other}; name another output (--out NAME), or remove that folder "
                "(--overwrite does)"
            )
        # The state goes last: a run that was killed after its weights were saved has more to do, if only to remove states.
        return not (self.output / STATE).is_file()

    def standing(self) -> list[Path]:
        if not (self.output / STATE).is_file() and not (
            (self.output / checkpoint.CONFIG).is_file()
            # Raises where it is no checkpoint, so that nothing else is removed.
            and checkpoint.read_config(self.output)["files"]
        ):
            return []
        return [self.output]

    def outlook(self) -> str:
        o: LoopOptions = self.options
        length = f"{o.steps:,} steps" if o.steps else f"{o.epochs:g} epochs"
        return f"{length} of {o.batch_size} {self.source.unit} over {self.source.outlook()}"

    def ranks(self, gpus: int) -> int:
        o: LoopOptions = self.options
        if o.ranks:
            return o.ranks
        # A batch that all GPUs cannot share is shared by as many as can.
        able = [n for n in range(1, gpus + 1) if self._shared(n)]
        ranks = max(able, default=1)
        if gpus > ranks:
            warnings.warn(
                f"{self.name}: {gpus - ranks} of {gpus} GPUs stay idle: {self._divided()} can be shared by {ranks}, not by "
                "more; another --batch-size or --micro-batch can use them",
                RuntimeWarning,
                stacklevel=2,
            )
        return ranks

    def _passes(self) -> int:
        """In how many forward passes of equal size, over all ranks, `--micro-batch` has a step's batch; the number of ranks
        must divide them, so that it decides no result.
        """
        o: LoopOptions = self.options
        least = max(1, math.ceil(o.batch_size / max(1, o.micro_batch)))
        return next(n for n in range(least, o.batch_size + 1) if o.batch_size % n == 0)

    def _shared(self, ranks: int) -> bool:
        """Whether so many ranks can share a step's batch alike."""
        o: LoopOptions = self.options
        if o.micro_batch:
            return self._passes() % ranks == 0
        each, rest = divmod(o.batch_size, ranks * o.accumulate)
        return not rest and each >= self.least

    def _divided(self) -> str:
        o: LoopOptions = self.options
        if o.micro_batch:
            return f"{o.batch_size} texts in parts of {o.batch_size // self._passes()}"
        return f"{o.batch_size} texts" + (
            f" in {o.accumulate} micro-batches each" if o.accumulate > 1 else ""
        )

    def _accumulate(self, ranks: int) -> int:
        """How many micro-batches each rank has in a step."""
        o: LoopOptions = self.options
        return self._passes() // ranks if o.micro_batch else o.accumulate

    def saves(self) -> bool:
        return bool(self.options.save_every)

    def run(self, report: Report) -> Mapping[str, Any]:
        with distributed.joined() as ranks, contextlib.ExitStack() as self._during:
            return self._run(ranks, report)

    def _run(self, ranks: Ranks, report: Report) -> Mapping[str, Any]:
        o = self.options
        if ranks.world > 1 and not self._shared(ranks.world):
            raise UserError(
                f"--batch-size {o.batch_size}: {ranks.world} ranks cannot share {self._divided()} alike"
            )
        accumulate = self._accumulate(ranks.world)
        data = self.source.data(self.start.image_size)
        model, tokenizer = self.initial(data)
        # The checkpoint says how long its texts were: whoever reads texts with it later goes by that.
        model.config = model.config.read_as(o.max_text_tokens, o.max_words)
        where = distributed.device()
        model.to(where)
        frozen(model, kind_of(model), o.freeze)
        recompute_activations(model, o.recompute)
        self._during.enter_context(remembering(model, self.workspace, pictures=not o.augment))
        self.prepare(data, model, where)
        rows = self.source.epoch(data)
        steps = o.steps or math.ceil(o.epochs * rows / o.batch_size)
        epoch = rows / o.batch_size
        ramp = getattr(o, "alpha_ramp_epochs", 0.0)
        by_step = o.schedule in BY_STEP
        views = None
        if o.augment and not getattr(o, "cache_features", False):
            views = Views(
                (o.crop_scale, 1.0),
                flip=0.5 if o.flip else 0.0,
                operations=o.randaugment,
                level=o.randaugment_level,
                seed=o.seed,
            )
        # An option with the name of a field is that field; the rest follow from options and data.
        told = {each.name: getattr(o, each.name) for each in fields(TrainConfig) if hasattr(o, each.name)}
        config = TrainConfig(
            **{
                **told,
                "steps": steps,
                "accumulate": accumulate,
                "warmup_steps": min(o.warmup_steps, steps // 2) if by_step else o.warmup_steps,
                "epoch_texts": 0 if by_step else round(rows),
                "betas": (0.9, o.beta2),
                "alpha_ramp_steps": math.ceil(ramp * epoch),
                "log_every": LOG_EVERY,
            }
        )
        self.output.mkdir(parents=True, exist_ok=True)
        if ranks.rank == 0:
            checkpoint.sweep(self.output)
        state_path = self.output / STATE
        module = self.module(model, tokenizer, ranks).to(where)
        result = train(
            module,
            lambda start: data.batches(
                tokenizer,
                o.batch_size,
                seed=o.seed,
                steps=steps,
                start_step=start,
                **self.longest(model),
                rank=ranks.rank,
                world=ranks.world,
                parts=accumulate,
                views=views,
                **self.source.feed(),
            ),
            config,
            on_step=lambda step, values: report(step, steps, self._shown(values)),
            on_best=partial(self._keep, "best", model, tokenizer, ranks) if o.keep_best else None,
            log_path=self.output / "log.jsonl",
            tensorboard_path=self.output / "tensorboard" if o.tensorboard else None,
            state_path=state_path if o.save_every else None,
            fingerprint=self.fingerprint(),
            examples=self.source.exposed(data),
            ranks=ranks,
            shard=o.shard,
        )
        figures = {
            "steps": result.steps,
            **self.source.account(data),
            "left_out": {**data.skipped, **data.deselected},
            "skipped_steps": result.skipped_steps,
            "seconds": round(result.seconds, 1),
            **self._shown(result.losses),
        }
        if result.average:
            self._keep("live", model, tokenizer, ranks, result.steps, result.losses.get("loss"))
        extra: dict[str, Any] = {
            "stage": self.name,
            "fingerprint": self.fingerprint(),
            "identity": dict(self.identity()),
            "origins": dict(self.origins()),
            **({"incomplete_inputs": dict(self.gaps)} if self.gaps else {}),
            "warnings": list(result.warnings),
        }
        # What everything downstream loads under the checkpoint's name is the average, where there is one.
        with swapped(module, result.average):
            complete = distributed.unsplit(model, lambda: build(model.config))
            if ranks.rank == 0:
                figures |= self.judged(complete, tokenizer, where)
                checkpoint.save(self.output, complete, tokenizer, {**extra, "figures": figures})
        if ranks.rank == 0:
            # After the weights, which are what cannot be made again; before the state, from which this can.
            _publish(self.output / EXPOSURES, _counted(self.source.named(data), result.exposures))
            state.remove(state_path)
        return {name: value for name, value in figures.items() if name not in _APART}

    def _keep(
        self, name: str, model: Model, tokenizer: Encodes, ranks: Ranks, step: int, loss: float | None
    ) -> None:
        """The checkpoint, by rank 0; all call it, since the weights may be split over them."""
        complete = distributed.unsplit(model, lambda: build(model.config))
        if ranks.rank == 0:
            extra = {"stage": self.name, "of": self.output.name, "step": step, "loss": loss}
            checkpoint.save(self.output / name, complete, tokenizer, extra)

    def _shown(self, values: Mapping[str, Any]) -> dict[str, float]:
        return {name: float(values[name]) for name in (*self.shown, "images_per_second") if name in values}


_APART = ("by_source", "left_out", "skipped_steps", "seconds")
"""Figures of a checkpoint that a summary does not repeat."""


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    new = json.loads(json.dumps(new))  # as the old was written: lists, not tuples
    before, after = old.get("options", {}), new.get("options", {})
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if names:
        return f" ({names[0]} was {before.get(names[0])!r}, is now {after.get(names[0])!r})"
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return f" ({names[0]} changed)" if names else ""


def _counted(named: Iterator[pa.Table], counts: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    start = 0
    for table in named:
        stop = start + table.num_rows
        yield table.append_column("exposures", pa.array(counts[start:stop]))
        start = stop


def _publish(path: Path, tables: Iterator[pa.Table]) -> None:
    """A row group per table, so that no more than one is held."""

    def write(attempt: Path) -> None:
        first = next(tables)
        with pq.ParquetWriter(attempt, first.schema, compression="zstd") as file:
            for table in itertools.chain([first], tables):
                file.write_table(table)

    path.unlink(missing_ok=True)
    publish_new(path, write)
