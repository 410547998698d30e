"""Running a stage: what is done already, what is to do, and the account at the end.

`inline.py` and `ray.py` do the work, `auto.py` chooses; this module says which, and never imports Ray itself.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from capfilt.errors import RunError, UserError
from capfilt.execution.progress import StageProgress
from capfilt.stages.base import ModelStage, Report, ShardStage
from capfilt.stages.command import StageCommand
from capfilt.tables.manifest import Counts, Manifest
from capfilt.tables.shards import Part
from capfilt.tables.visible import say
from capfilt.tables.workspace import Workspace
from capfilt.training.launched import launched_rank, started_together

EXECUTIONS = ("auto", "ray", "inline")


class Executor(Protocol):
    """Does the work of a stage somewhere."""

    def shards(self, stage: ShardStage, mark: str, todo: list[int]) -> Iterator[Manifest]:
        """Process and commit `todo`, yielding each manifest as it is committed, in any order."""

    def model(self, stage: ModelStage, report: Report) -> Mapping[str, Any]:
        """Run a stage that is one piece of work."""

    def share(self, ways: int) -> SharedExecutor | None:
        """The same with one of `ways` equal shares for each stage, for as many threads; None: one stage at a time."""


class SharedExecutor(Executor, Protocol):
    """What several threads may run stages on at the same time."""

    def stop(self) -> None:
        """End what runs: every thread gets a RunError."""


@dataclass(frozen=True)
class Summary:
    """What happened to one stage.

    Attributes:
        counts: in the stage's input rows; None for a stage that writes a checkpoint or a result.
        rows_out: rows of the output part.
        seconds: wall time of this run; near 0 where everything was done before.
        done_before: units (shards, or 1) that stood already.
        done_now: units done by this run.
        figures: what else the stage has to say.
        table: lines for people about what was done now.
        fault: why the run counts as failed although it ended; "" where it does not.
    """

    stage: str
    output: str
    seconds: float
    counts: Counts | None = None
    rows_out: int = 0
    done_before: int = 0
    done_now: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    table: Sequence[str] = ()
    fault: str = ""

    def lines(self) -> list[str]:
        """The line, and the table where there is one."""
        return [self.line(), *(f"  {row}" for row in self.table)]

    def line(self) -> str:
        """One line for people."""
        name = f"{self.stage:<18}"
        if self.counts is None:
            state = "done before" if not self.done_now else f"{self.seconds:,.1f} s"
            figures = "  ".join(f"{key} {_short(value)}" for key, value in self.figures.items())
            return f"{name} {self.output}  {state}  {figures}".rstrip()
        counts = self.counts
        text = f"{name} {counts.rows_in:,} in = {counts.kept:,} kept"
        text += f" + {sum(counts.dropped.values()):,} dropped{_reasons(counts.dropped)}"
        text += (
            f" + {sum(counts.failed.values()):,} failed{_reasons(counts.failed)}; {self.rows_out:,} rows out"
        )
        if self.done_now:
            return f"{text}  {self.seconds:,.1f} s"
        return f"{text}  done before"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reasons(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    parts = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return " (" + ", ".join(f"{name} {count:,}" for name, count in parts[:6]) + ")"


def executor(execution: str) -> AbstractContextManager[Executor]:
    """The executor called `execution`, started on entering and stopped on leaving the context."""
    if execution == "ray" and started_together():
        raise UserError(
            "under torchrun, give --execution inline; on a Ray cluster, start capfilt once and give --ranks"
        )
    if execution == "auto":
        from capfilt.execution.auto import AutoExecutor

        return AutoExecutor()
    if execution == "inline":
        from capfilt.execution.inline import InlineExecutor

        return InlineExecutor()
    if execution == "ray":
        if importlib.util.find_spec("ray") is None:
            raise UserError("Ray is not installed: pip install ray, or use --execution inline")
        from capfilt.execution.ray import RayExecutor

        return RayExecutor()
    raise UserError(f"--execution {execution!r}: choose {', '.join(EXECUTIONS)}")


def todo(stage: ShardStage, mark: str) -> tuple[list[int], list[int]]:
    """The shards of `stage` that are to do and those that stand. Raises UserError where the output does not agree."""
    shards = stage.shards()
    committed = set(stage.output.shards())
    foreign = sorted(committed - set(shards) - set(stage.output.planned if committed else ()))
    if foreign:
        raise UserError(
            f"{stage.output.path}: holds shard {foreign[0]:05d}, which the input has not; {stage.output.ways_out}"
        )
    missing: list[int] = []
    standing: list[int] = []
    for shard in shards:
        manifest = stage.output.manifest(shard) if shard in committed else None
        if manifest is None:
            missing.append(shard)
            continue
        problem = stage.output.problem(manifest)
        if problem is not None:
            raise UserError(f"{problem}; restore it, or remove the shard and its manifest and run again")
        if manifest.fingerprint != stage.shard_fingerprint(mark, shard):
            raise UserError(
                f"{stage.output.path}: shard {shard:05d} is stale: its input changed after it was written; "
                f"{stage.output.ways_out}"
            )
        (missing if stage.renews(manifest) else standing).append(shard)
    return missing, standing


def outlook(stage: ShardStage | ModelStage) -> str:
    """What running `stage` would do, in words. Writes nothing."""
    if isinstance(stage, ModelStage):
        return "done" if stage.done() else f"to do: {stage.outlook()} -> {stage.output}"
    mark = stage.output.identity_fingerprint(stage.contract, stage.name, stage.full_identity())
    missing, standing = todo(stage, mark)
    rows = sum(stage.expected_rows(shard) for shard in missing)
    if not missing:
        return f"done: {len(standing):,} shards, {stage.output.rows:,} rows"
    return f"to do: {len(missing):,} of {len(missing) + len(standing):,} shards, {rows:,} rows -> {stage.output.path}"


def run_shards(stage: ShardStage, work: Executor, *, quiet: bool = False) -> Summary:
    """Do what is missing of `stage`. Returns the account of the whole part."""
    start = time.monotonic()
    if started_together():
        raise UserError(f"{stage.name} works shard by shard: start it without torchrun")
    began = not stage.output.exists
    mark = stage.begin()
    missing, standing = todo(stage, mark)
    tally = stage.tally()
    done = Counts(0, 0)
    if missing:
        with StageProgress(stage.name, len(missing) + len(standing), "shards", quiet=quiet) as progress:
            try:
                for number, manifest in enumerate(work.shards(stage, mark, missing), start=1):
                    done = done + manifest.counts
                    if tally is not None:
                        tally.add(manifest, stage.output.stats(manifest.shard))
                    figures = None if tally is None else tally.figures(time.monotonic() - start)
                    progress.update(len(standing) + number, rows=done.rows_in, figures=figures)
            except UserError:
                if began:
                    stage.output.withdraw()
                raise
    stage.finish()
    whole = stage.output.counts()
    return Summary(
        stage.name,
        str(stage.output.path),
        time.monotonic() - start,
        whole,
        stage.output.rows,
        len(standing),
        len(missing),
        table=[
            *(tally.lines(time.monotonic() - start) if tally is not None and missing else ()),
            *stage.remarks(),
        ],
        fault=fault(done, whole),
    )


def run_model(stage: ModelStage, work: Executor, *, quiet: bool = False) -> Summary:
    """Run `stage` unless its output stands."""
    start = time.monotonic()
    if stage.done():
        return _account(stage, start, done_before=1)
    said = [] if quiet or launched_rank() else stage.forewarning()
    for line in said:
        say(f"capfilt: warning: {line}", err=True)
    # Stages of one name may run together: what they write tells them apart.
    name = f"{stage.name} {stage.output.stem}"
    with StageProgress(name, 0, stage.unit, quiet=quiet or launched_rank() > 0) as progress:
        figures = work.model(
            stage, lambda step, total, latest: progress.update(step, total=total, figures=latest)
        )
    return _account(stage, start, said, done_now=1, figures=figures)


def _account(stage: ModelStage, start: float, said: Sequence[str] = (), **done: Any) -> Summary:
    seconds = time.monotonic() - start
    # Under torchrun another process may still have to publish the output.
    remarks = [] if launched_rank() else [line for line in stage.remarks() if line not in said]
    return Summary(stage.name, str(stage.output), seconds, table=remarks, **done)


def run_stage(stage: ShardStage | ModelStage, work: Executor, *, quiet: bool = False) -> Summary:
    """Run a stage of either kind."""
    if isinstance(stage, ShardStage):
        return run_shards(stage, work, quiet=quiet)
    return run_model(stage, work, quiet=quiet)


def run_command(
    command: StageCommand,
    options: Any,
    workspace: Workspace,
    execution: str | Executor,
    *,
    output: Part | None = None,
    quiet: bool = False,
    clear: Callable[[ShardStage | ModelStage], None] = lambda stage: None,
) -> Iterator[Summary]:
    """Run the stages behind one command, yielding the account of each. `clear` is called with a stage before it runs.

    The first stage checks its options before a cluster is started for it. Raises RunError after the account of a stage of
    which nothing came through.
    """
    first, *rest = command.classes(options)
    stage = command.build(first, options, workspace, output)
    clear(stage)
    context = executor(execution) if isinstance(execution, str) else nullcontext(execution)
    with context as work:
        yield from _judged(run_stage(stage, work, quiet=quiet))
        for path in rest:
            stage = command.build(path, options, workspace)
            clear(stage)
            yield from _judged(run_stage(stage, work, quiet=quiet))


def _judged(summary: Summary) -> Iterator[Summary]:
    yield summary
    if summary.fault:
        raise RunError(f"{summary.stage}: {summary.fault}")


HINTS = {
    "dns": "is this machine offline?",
    "connection": "is this machine offline, or behind a proxy?",
    "timeout": "is the network slow? --timeout gives answers more time",
    "blocked_address": "a private network's addresses need --allow-private",
    "bad_url": "is --url-col the column of the URLs?",
    "not_found": "is this list of URLs still valid?",
    "opted_out": "the hosts do not allow it",
    "hash_mismatch": "is --verify-hash the column of these bodies' hashes?",
    "worker_died": "the messages above say why",
    "file_missing": "do the pictures lie where the list says?",
    "no_image": "are these the images that the rows name?",
    "empty_text": "is --caption-col the column of the texts?",
}
"""By failure, a question that helps where every row failed for it."""

JUDGED = 20
"""Rows of a run from which on a single failure of all is no accident."""


def fault(*counts: Counts) -> str:
    """That every row of one of these accounts failed for one reason, in words; "" where no account says so."""
    for each in counts:
        failed = [(name, count) for name, count in each.failed.items() if count]
        if each.rows_in >= JUDGED and len(failed) == 1 and failed[0][1] == each.rows_in:
            name = failed[0][0]
            hint = f"; {HINTS[name]}" if name in HINTS else ""
            return f"{each.rows_in:,} of {each.rows_in:,} failed: {name}{hint}"
    return ""
