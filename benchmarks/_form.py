"""The one form that every benchmark here speaks: its options, its JSON, its table, its exit status.

What lives here: `main`, which runs a benchmark's body, and helpers to time two things in pairs and to read peak memory.
What does not: anything measured. A benchmark is a script `benchmarks/NAME.py`:

    from _form import Record, main

    def measure(args, record):
        record.figure("seconds", 1.5)
        record.target("seconds", 1.5, "<=", 60)

    if __name__ == "__main__":
        main(__doc__, measure)

It then takes `--json FILE`, `--quick` and `--seed N`, prints its figures and targets as a table, writes the same to
FILE as {benchmark, command, commit, machine, versions, seed, figures: {name: number}, targets: {name: {value, target,
met}}}, and exits 1 when a target is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import operator
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if util.find_spec("capfilt") is None:
    # A plain checkout, without an install, can be measured too.
    sys.path.insert(0, str(ROOT))

from capfilt.errors import UserError  # noqa: E402

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Target:
    """A figure that has to compare with a limit: `value` `comparison` `limit`. NaN meets nothing."""

    value: float
    comparison: str
    limit: float

    @property
    def met(self) -> bool:
        """Whether it does."""
        return not math.isnan(self.value) and OPERATORS[self.comparison](self.value, self.limit)

    def __str__(self) -> str:
        return f"{self.comparison} {self.limit:g}"


@dataclass
class Record:
    """What a benchmark found, in the order it was found."""

    figures: dict[str, float] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)

    def figure(self, name: str, value: float) -> None:
        """Adds a figure. A name is used once; its unit belongs into the name (`seconds`, `peak_gib`)."""
        if name in self.figures:
            raise ValueError(f"figure {name!r} is there already")
        self.figures[name] = float(value)

    def target(self, name: str, value: float, comparison: str, limit: float) -> None:
        """Adds a target, and the figure of that name where there is none: `target("seconds", 3.2, "<=", 60)`."""
        if name in self.targets:
            raise ValueError(f"target {name!r} is there already")
        if comparison not in OPERATORS:
            raise ValueError(f"{comparison!r} is none of {', '.join(OPERATORS)}")
        self.targets[name] = Target(float(value), comparison, float(limit))
        self.figures.setdefault(name, float(value))


def main(
    description: str | None,
    body: Callable[[argparse.Namespace, Record], None],
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a benchmark and exits: 0, or 1 when a target is not met, or 2 for a wrong option.

    body: is given the parsed options (`quick`, `seed`, and the benchmark's own) and the record to fill. arguments: adds
    the benchmark's own options to the parser.
    """
    words = sys.argv if argv is None else argv
    name = Path(words[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--quick", action="store_true", help="the same work, smaller: under 60 s on 2 cores")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default 0)")
    if arguments is not None:
        arguments(parser)
    args = parser.parse_args(words[1:])
    record = Record()
    try:
        body(args, record)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    # After the body, so that the versions are those of what it imported.
    result = as_dict(name, words, args.seed, record)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # Not in place: a reader never sees half a result.
        draft = args.json.with_name(f".{args.json.name}.{os.getpid()}")
        draft.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(args.json)
    print(as_table(result))
    sys.exit(0 if all(target.met for target in record.targets.values()) else 1)


def as_dict(name: str, words: Sequence[str], seed: int, record: Record) -> dict[str, Any]:
    """The result in the form that all benchmarks share; a figure that is not finite becomes null."""
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{Path(words[0]).name}", *words[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "seed": seed,
        "figures": {key: _finite(value) for key, value in record.figures.items()},
        "targets": {
            key: {"value": _finite(target.value), "target": str(target), "met": target.met}
            for key, target in record.targets.items()
        },
    }


def as_table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['benchmark']}: {result['command']}"]
    lines.append("machine   " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    lines.append("versions  " + ", ".join(f"{key} {value}" for key, value in result["versions"].items()))
    lines.append(f"commit    {result['commit']}, seed {result['seed']}")
    width = max([len(key) for key in result["figures"]], default=0)
    for key, value in result["figures"].items():
        line = f"  {key:<{width}}  {_number(value):>12}"
        target = result["targets"].get(key)
        if target is not None:
            line += f"  {target['target']:<12} {'met' if target['met'] else 'NOT MET'}"
        lines.append(line)
    return "\n".join(lines)


def commit() -> str:
    """The checkout's commit, with `-dirty` where tracked files differ from it; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, str | int | float]:
    """Processor, usable cores, memory, system and, where torch is in use and sees any, GPUs."""
    found: dict[str, str | int | float] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = torch.cuda.device_count()
        found["gpu"] = torch.cuda.get_device_name(0)
    if "OMP_NUM_THREADS" in os.environ:
        found["omp_num_threads"] = os.environ["OMP_NUM_THREADS"]
    return found


def versions() -> dict[str, str]:
    """Python, capfilt, and those of its dependencies that the benchmark has loaded."""
    watched = (
        "numpy torch pyarrow ray duckdb pillow tokenizers safetensors transformers datasets img2dataset scipy"
    )
    modules = {"pillow": "PIL"}
    found = {"python": platform.python_version()}
    for name in ["capfilt", *watched.split(), "scikit-learn", "pycocoevalcap"]:
        module = modules.get(name, name.replace("scikit-learn", "sklearn"))
        if module in sys.modules:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
            found.setdefault(name, str(getattr(sys.modules[module], "__version__", "unknown")))
    return found


@dataclass(frozen=True)
class Pairs:
    """Seconds of two things run in turn; `ratio` is how many times longer the second takes, median over the pairs."""

    first: list[float]
    second: list[float]

    @property
    def ratio(self) -> float:
        """Above 1 where the first is faster."""
        return statistics.median(b / a for a, b in zip(self.first, self.second, strict=True))


def in_pairs(first: Callable[[], object], second: Callable[[], object], pairs: int) -> Pairs:
    """Times both alternately in this process, each going first in every other pair, so that drift hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            times[which].append(time.perf_counter() - start)
    return Pairs(*times)


class PeakMemory:
    """The most resident memory of this process while `peak_memory()` was open, in GiB."""

    gib: float = math.nan


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measures peak resident memory, what was there before included.

    Where the kernel does not let the high-water mark be reset, it is that of the whole run: never too low.
    """
    peak = PeakMemory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    peak.gib = _high_water() / 2**30


def _high_water() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # Kilobytes on Linux, bytes on macOS.
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"
