"""The training loop: batches in, a trained module, a log and an account of what was seen out; resumes exactly.

The same loop runs in one process and in each of several that train together.

Any module with `losses(batch, alpha, hardness) -> {"loss": ..., ...}` trains here (BLIP's is `BlipPretraining`). Not
here: its settings (`config.py`), its log's file (`log.py`), what the log is watched for (`watch.py`), the losses
(`capfilt.models.objectives`), which rows make a batch (`capfilt.data.pairs`), finished checkpoints
(`capfilt.models.checkpoint`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import RunError, UserError
from capfilt.models.common.objectives import alpha_ramp, hardness_ramp
from capfilt.models.common.precision import has_bf16
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.training import average, distributed, optim, state, throughput
from capfilt.training.config import Batches, OnBest, OnStep, TrainConfig, TrainResult
from capfilt.training.interrupt import Interrupt, Interrupted
from capfilt.training.log import Log
from capfilt.training.standing import Standing
from capfilt.training.watch import Watched, watches

__all__ = ["TrainConfig", "TrainResult", "train"]

EXPOSED = 2**20
"""Examples whose counts are exchanged at a time: 8 MiB per rank."""

MAX_SKIPS = 20
"""So many steps in a row with a non-finite loss or gradient end the run: the model will not come back by itself."""


@dataclass
class _Progress:
    """What resuming needs beside tensors. JSON keeps floats exactly, so a resumed log line is the same line."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    rows: int = 0
    window_steps: int = 0
    window_seconds: float = 0.0
    watched: Watched = field(default_factory=Watched)
    last: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    settled: int | None = None
    comparable: bool = False
    warnings: list[str] = field(default_factory=list)


def train(
    module: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    on_step: OnStep | None = None,
    on_best: OnBest | None = None,
    log_path: Path | None = None,
    tensorboard_path: Path | None = None,
    state_path: Path | None = None,
    fingerprint: str = "",
    examples: int = 0,
    ranks: Ranks = ALONE,
    shard: bool = False,
) -> TrainResult:
    """Trains `module` in place, on the device it is on, for `config.steps` steps.

    Args:
        module: has `losses(batch, alpha, hardness) -> {"loss": scalar with gradient, name: scalar, ...}`, called once per
            micro-batch, and perhaps `after_step()`, called when a step has moved the weights, for what follows them
            (momentum towers). A step's loss and figures are means over its micro-batches,
            weighted by their texts; a loss that compares texts with one another (ITC, ITM's negatives) sees those of its
            own micro-batch only, and the queue. `rates() -> {name: factor}` says which parameters have a learning
            rate of their own. A `figures() -> {name: scalar}` is called once per log line, for what is too slow for
            every step. A step whose loss or gradient is not finite on any rank is skipped on all ranks. It moves
            the count of steps, which learning rate and ramps go by, and the random state, and nothing else: what
            `losses` changes must be buffers or extra state, which are put back.
        batches: an iterable, or a function from the number of the first step wanted to one, which spares a resumed run
            the batches it has had (`capfilt.data.pairs.Pairs.batches` by its `start_step`). An iterable that
            ends is started again; one that yields nothing then ends the run with RunError.
        on_step: progress, on rank 0; an exception from it ends the run, and True stops it as a signal does.
        on_best: keep these weights: called when a state is due (`save_every`, and the last step) and the mean loss of the
            last log line is the lowest of those so far. It is the training loss, so "best" means least diverged. Losses
            are compared from where they mean the same: the ramps of `config` are over, and `module.settled`, where it has
            that, is true (a queue that fills makes ITC harder). A run that ends before keeps its last weights.
        log_path: JSON lines, one per `log_every` steps and one for the last: means over those steps of every loss and
            figure and of "grad_norm"; "lr", "alpha", "images_per_second" (texts; equal to images where each has one),
            "seconds", "skipped_steps", and on GPUs that `throughput.PEAK_FLOPS` knows "mfu", of the bf16 peak.
        tensorboard_path: directory of TensorBoard event files with the same figures (`capfilt[tensorboard]`).
        state_path: file of the training state, written every `save_every` steps, at the end, and when SIGTERM or
            SIGINT arrives: the step in progress is finished, the state saved, and the signal raised again, or
            KeyboardInterrupt where it came to another rank. Where the file exists the run continues from it, skipping
            the batches it has had: the rest is what an uninterrupted run would have done, bit for bit on a CPU. With
            `config.keep_states` above 1 older states stay beside it (`state.write_newest`); `state.remove` deletes
            them all when the finished model is safe.
        fingerprint: of the data and whatever else the caller wants to be the same when a state is continued.
        examples: how many examples the corpus has: the length of `exposures`. Larger numbers lengthen it.
        ranks: the processes that train together, from `distributed.joined`. Each calls this with a module built alike and
            with batches of its own, as many per step and in as many parts as the others'. A step's gradient and figures
            are the means over ranks; rank 0 writes, logs, warns and calls `on_step`, and has the exposures of all;
            `on_best` is called on every rank. A signal to one ends them all after the same step. A state continues with
            any number of ranks; only their own draws (dropout) then differ.
        shard: split weights, gradients and moments over the ranks: see `distributed.Together`. `distributed.unsplit` has
            the trained module then.

    Raises:
        UserError: nothing to train; a state of another run at `state_path`; TensorBoard asked for and not installed.
        RunError: 20 steps in a row had a non-finite loss or gradient; batches ended; the state cannot be written.

    The global random state of torch is used, seeded with `config.seed`, and put back afterwards.
    """
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(distributed.seed_of(config.seed, ranks))
        run = _Run(module, batches, config, state_path, fingerprint, examples, ranks, shard)
        run.on_best = on_best
        if ranks.rank == 0:
            run.on_step = on_step
            run.log = Log(log_path, run.progress.step, tensorboard_path)
        try:
            with run.interrupt.listening(state_path is not None):
                run.steps()
        finally:
            run.log.close()
        return run.result()


class _Run:
    def __init__(
        self,
        module: nn.Module,
        batches: Batches,
        config: TrainConfig,
        state_path: Path | None,
        fingerprint: str,
        examples: int,
        ranks: Ranks,
        shard: bool,
    ) -> None:
        self.module = module.train()
        self.ranks = ranks
        self.batches = batches
        self.config = config
        self.on_step: OnStep | None = None
        self.on_best: OnBest | None = None
        self.log = Log(None, 0)
        self.state_path = state_path
        self.exposures = np.zeros(examples, dtype=np.int64)
        self.progress = _Progress()
        own = getattr(module, "config", None)
        self.identity: dict[str, Any] = {
            **config.identity(),
            "fingerprint": fingerprint,
            "module": dataclasses.asdict(own)
            if dataclasses.is_dataclass(own) and not isinstance(own, type)
            else None,
        }
        self.identity = _jsonable(self.identity)
        saved = self._read(state_path) if state_path is not None and state_path.exists() else {}
        if saved:
            state.restore_module(module, saved)
        self.together = distributed.Together(module, ranks, shard)
        self.parameters = optim.trainable(module)
        self.device = next(iter(self.parameters.values())).device
        factors = {name: config.head_rate for name in self.parameters if ".cls_head." in name}
        factors |= getattr(module, "rates", dict)()
        self.optimizer = optim.AdamW(
            self.parameters, config.betas, config.weight_decay, config.decay, factors=factors
        )
        self.standing = Standing(module)
        self.average = None
        if config.ema:
            self.average = average.WeightAverage(average.averaged(module, self.parameters), config.ema)
        self.interrupt = Interrupt(alone=ranks.world == 1)
        self.watches = watches(config.stuck_steps, config.collapse_steps)
        self.peak = throughput.peak_flops(self.device)
        self.flops: float | None = None
        if saved:
            self._resume(saved)
        self._agree()

    def _agree(self) -> None:
        """All ranks go on from one step, and all count FLOPs, which takes their exchanges, or none does."""
        mine = torch.tensor([self.progress.step, int(self.peak is not None)], device=self.device)
        steps, known = self.ranks.stack(mine).T.tolist()
        if len(set(steps)) > 1:
            raise RunError(
                f"{self.state_path}: the ranks would go on from different steps ({', '.join(map(str, steps))}); "
                "the workspace must be one directory that every machine sees"
            )
        if not all(known):
            self.peak = None

    def result(self) -> TrainResult:
        done = self.progress
        return TrainResult(
            done.step,
            done.seconds,
            self._all_exposures(),
            dict(done.last),
            done.skipped,
            tuple(done.warnings),
            dict(self.average.tensors) if self.average else {},
        )

    # ------------------------------------------------------------------ steps

    def steps(self) -> None:
        config, progress = self.config, self.progress
        if progress.step >= config.steps:
            return
        stream = _stream(self.batches, progress.step, config.steps)
        # Between steps everything is whole, so an exception from a batch or a callback may be answered by saving.
        whole = True
        try:
            while progress.step < config.steps:
                begin = time.perf_counter()
                batch = next(stream)
                whole = False
                values = self._step(batch)
                spent = time.perf_counter() - begin
                progress.seconds += spent
                progress.window_seconds += spent
                last = progress.step == config.steps
                if progress.step % config.log_every == 0 or last:
                    self._log(values)
                whole = True
                if last or (config.save_every and progress.step % config.save_every == 0):
                    # The best first: a state that knows of it must not outlive a crash that it did not.
                    self._keep_best()
                    if self.state_path is not None:
                        self._save()
                if self.on_step is not None and self.on_step(progress.step, values):
                    self.interrupt.ask()
                self.interrupt.check()
        except KeyboardInterrupt as stop:
            # Saving takes all ranks, and only an agreed stop finds them at the same step.
            together = self.ranks.world == 1 or isinstance(stop, Interrupted)
            if whole and together and self.state_path is not None:
                self._save()
                # Who started the ranks may end all of them when one ends: none does while rank 0 still writes.
                self.ranks.mean(torch.zeros(1, device=self.device))
            raise

    def _step(self, batch: Batch) -> dict[str, float]:
        config, progress = self.config, self.progress
        if progress.settled is None and self._settled():
            progress.settled = progress.step
        rate = config.rate(progress.step)
        alpha = alpha_ramp(progress.step, config.alpha_ramp_steps, config.alpha)
        hardness = hardness_ramp(progress.step, config.hardness_ramp_steps)
        if self.peak and self.flops is None:
            self.flops = throughput.flops_per_text(
                self.module, batch, lambda few: self._losses(few, alpha, hardness)
            )
        self.standing.keep()
        rows = len(batch.example)
        parts = batch.split(config.accumulate)
        if self.ranks.world > 1 and len(parts) < config.accumulate:
            raise RunError(
                f"step {progress.step + 1}: {rows} texts that can be read are too few for {config.accumulate} "
                "micro-batches, which the other ranks have; look at the part with `capfilt doctor --verify`"
            )
        found: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            share = len(part.example) / rows
            with self.together.backward(last=number == len(parts) - 1):
                losses = self._losses(part, alpha, hardness)
                (losses["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, figure in losses.items():
                weighted = figure.detach().float() * share
                found[name] = found[name] + weighted if number else weighted
        norm = optim.clip_gradients(self.parameters.values(), config.clip_norm)
        # One exchange and one transfer per step for everything that is looked at: each would be a stop of its own on a
        # GPU. That it is the same on all ranks is what lets them skip, stop and save together.
        own = torch.tensor([float(rows), float(self.interrupt.wanted)]).to(norm.device)
        *figures, mean_rows, stop = self.ranks.mean(torch.stack([*found.values(), norm, *own])).tolist()
        values: dict[str, float] = dict(zip([*found, "grad_norm"], figures, strict=True))
        self.interrupt.agree(stop > 0)
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            self.optimizer.step(rate)
            if hasattr(self.module, "after_step"):
                self.module.after_step()  # type: ignore[operator]
            if self.average:
                self.average.update(progress.step - progress.skipped)
            progress.skipped_in_a_row = 0
            self._expose(batch.example)
            progress.counted += 1
            for name, value in values.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
        else:
            self.standing.put_back()
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if progress.skipped == 1:
                broken = ", ".join(name for name, value in values.items() if not math.isfinite(value))
                self._warn(
                    f"step {progress.step + 1}: {broken} not finite; the step is skipped and counted. Should it go on: "
                    "lower learning_rate, keep clip_norm above 0, or train with precision fp32"
                )
            if progress.skipped_in_a_row >= MAX_SKIPS:
                raise RunError(
                    f"step {progress.step + 1}: the loss or its gradient was not finite {MAX_SKIPS} times in a row; "
                    "lower learning_rate, keep clip_norm above 0, or train with precision fp32"
                )
        self.optimizer.zero_grad()
        progress.step += 1
        progress.window_steps += 1
        progress.rows += round(mean_rows * self.ranks.world)
        return {**values, "lr": rate, "alpha": alpha}

    def _losses(self, batch: Batch, alpha: float, hardness: float) -> dict[str, Tensor]:
        on_device = batch.to(self.device, non_blocking=True)
        with self._autocast():
            return self.together.losses(on_device, alpha, hardness)

    def _autocast(self) -> AbstractContextManager[object]:
        precision = self.config.precision
        half = precision == "bf16" or (precision == "auto" and has_bf16(self.device))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def _expose(self, example: Tensor) -> None:
        seen = np.bincount(example.numpy(force=True))
        if len(seen) > len(self.exposures):
            self.exposures = np.pad(self.exposures, (0, len(seen) - len(self.exposures)))
        self.exposures[: len(seen)] += seen

    # ------------------------------------------------------------------ log

    def _log(self, values: Mapping[str, float]) -> None:
        progress = self.progress
        figures: dict[str, float] = {name: total / progress.counted for name, total in progress.sums.items()}
        if figures and hasattr(self.module, "figures"):
            slow = {name: float(value) for name, value in self.module.figures().items()}  # type: ignore[operator]
            figures |= {name: value for name, value in slow.items() if math.isfinite(value)}
        rate = progress.rows / max(progress.window_seconds, 1e-9)
        line: dict[str, Any] = {
            "step": progress.step,
            **figures,
            "lr": values["lr"],
            "alpha": values["alpha"],
            "images_per_second": rate,
            "seconds": progress.seconds,
            "skipped_steps": progress.skipped,
        }
        if self.peak and self.flops:
            line["mfu"] = rate * self.flops / self.peak / self.ranks.world
        self.log.write(line)
        progress.last = {name: float(value) for name, value in line.items()}
        begun = progress.step - progress.window_steps
        progress.comparable = progress.settled is not None and begun >= progress.settled
        for watch in self.watches:
            message = watch.line(figures, progress.counted, progress.watched)
            if message:
                self._warn(f"step {progress.step}: {message}")
        progress.sums, progress.counted, progress.rows = {}, 0, 0
        progress.window_steps, progress.window_seconds = 0, 0.0

    def _warn(self, message: str) -> None:
        self.progress.warnings.append(message)
        if self.ranks.rank == 0:
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _all_exposures(self) -> npt.NDArray[np.int64]:
        """How often every rank together saw each example, on rank 0; elsewhere this rank's own."""
        if self.ranks.world == 1:
            return self.exposures
        longest = max(self.ranks.rows(len(self.exposures)).counts)
        mine = np.pad(self.exposures, (0, longest - len(self.exposures)))
        # A piece at a time: everyone's numbers of all texts would be tens of GiB of a large corpus, on each GPU.
        for start in range(0, longest, EXPOSED):
            piece = mine[start : start + EXPOSED]
            every = self.ranks.stack(torch.from_numpy(piece).to(self.device)).sum(dim=0)
            if self.ranks.rank == 0:
                piece[:] = every.numpy(force=True)
        return mine if self.ranks.rank == 0 else self.exposures

    def _settled(self) -> bool:
        """Whether losses of this step and later ones can be compared with one another."""
        config = self.config
        ramps = max(config.alpha_ramp_steps if config.alpha else 0, config.hardness_ramp_steps)
        return self.progress.step >= ramps and bool(getattr(self.module, "settled", True))

    # ------------------------------------------------------------------ state

    def _keep_best(self) -> None:
        progress = self.progress
        loss = progress.last.get("loss")
        if self.on_best is None or loss is None or (progress.best is not None and loss >= progress.best):
            return
        if not progress.comparable and progress.step < self.config.steps:
            return
        progress.best = loss
        with average.swapped(self.module, self.average.tensors if self.average else {}):
            self.on_best(progress.step, loss)

    def _save(self) -> None:
        assert self.state_path is not None
        tensors = state.capture(self.module, self.optimizer)
        if self.average:
            tensors.update({f"average.{name}": tensor for name, tensor in self.average.tensors.items()})
        tensors = distributed.gathered(tensors, self.ranks)
        tensors |= state.capture_random(self.device, self.ranks)
        tensors["exposures"] = torch.from_numpy(self._all_exposures())
        if self.ranks.rank == 0:
            values = {"identity": self.identity, "progress": dataclasses.asdict(self.progress)}
            state.write_newest(self.state_path, self.progress.step, tensors, values, self.config.keep_states)

    def _read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a saved state of this very run; its progress is taken on."""
        tensors, values = state.read(path)
        # A state may be older than an option: it was then saved under what is the option's default now.
        theirs = {**_jsonable(TrainConfig(steps=1).identity()), **values["identity"]}
        if theirs.get("module") and self.identity["module"]:
            made = type(getattr(self.module, "config"))  # noqa: B009
            theirs["module"] = {**_jsonable(dataclasses.asdict(made())), **theirs["module"]}
        changed = [name for name in self.identity if theirs.get(name) != self.identity[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{path} was saved by a run with {name} {theirs.get(name)!r}, now {self.identity[name]!r}: "
                "restore it, or delete the file to start over"
            )
        known = {each.name for each in dataclasses.fields(_Progress)}
        theirs = {name: value for name, value in values["progress"].items() if name in known}
        self.progress = _Progress(**{**theirs, "watched": Watched(**theirs.get("watched", {}))})
        # Saved as the sum over ranks, so one of them goes on from it.
        if self.ranks.rank == 0:
            self.exposures = tensors["exposures"].numpy().copy()
        return tensors

    def _resume(self, tensors: Mapping[str, Tensor]) -> None:
        state.restore_optimizer(self.optimizer, tensors)
        if self.average:
            prefix = "average."
            self.average.load(
                {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            )
        seed = distributed.seed_of(self.config.seed, self.ranks, self.progress.step)
        state.restore_random(tensors, self.device, self.ranks, seed)


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON and back, so that tuples compare as the lists they are stored as."""
    made: dict[str, Any] = json.loads(json.dumps(values))
    return made


def _stream(batches: Batches, start: int, steps: int) -> Iterator[Batch]:
    """The batches from step `start` on, without end."""
    if callable(batches):
        step = start
        while True:
            before = step
            for batch in batches(step):
                step += 1
                yield batch
            if step == before:
                raise RunError(
                    f"the batches ended after {step} of {steps} steps: the corpus is shorter than the run"
                )
    step = 0
    while True:
        before = step
        for batch in batches:
            step += 1
            if step > start:
                yield batch
        if step == before:
            raise RunError(
                f"the batches ended after {step} of {steps} steps: the corpus is empty or read only once"
            )
