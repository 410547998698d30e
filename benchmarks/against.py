"""Another benchmark's figures in this checkout over those in another commit, both run in turn, each first in every other pair.

A ratio's median over the pairs has a bootstrap interval of 90%. A figure holds where its median is at least --least, or its
interval reaches 1.

python benchmarks/against.py --against HEAD~1 --figures base_both_images_per_second -- engine.py --preset base
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from _form import ROOT, Record, main


def figures(tree: Path, words: list[str], out: Path) -> dict[str, float]:
    """The figures of one run of a benchmark in a checkout."""
    command = [sys.executable, f"benchmarks/{words[0]}", *words[1:], "--json", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    # Its targets are its own business: an exit of 1 has figures too.
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not out.is_file():
        raise SystemExit(f"{tree}: {' '.join(command)} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(out.read_text())["figures"]
    out.unlink()
    return found


def measure(args: argparse.Namespace, record: Record) -> None:
    """Ratios of the figures that were asked for, here over there."""
    pairs = 2 if args.quick else args.pairs
    words = [word for word in args.benchmark if word != "--"]
    with tempfile.TemporaryDirectory() as name:
        there = Path(name) / "there"
        packed = Path(name) / "there.tar"
        subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(packed), args.against], check=True)
        with tarfile.open(packed) as archive:
            archive.extractall(there, filter="data")
        found: dict[Path, list[dict[str, float]]] = {ROOT: [], there: []}
        for number in range(pairs):
            for tree in (ROOT, there) if number % 2 == 0 else (there, ROOT):
                found[tree].append(figures(tree, words, Path(name) / "figures.json"))
    record.figure("pairs", pairs)
    rng = np.random.default_rng(args.seed)
    for figure in args.figures:
        both = [np.array([run[figure] for run in found[tree]]) for tree in (ROOT, there)]
        ratios = both[0] / both[1]
        for number, (new, old, ratio) in enumerate(zip(*both, ratios, strict=True), 1):
            print(f"{figure} {number}: here {new:.4g}, there {old:.4g}, ratio {ratio:.4f}", flush=True)
        medians = np.median(rng.choice(ratios, (2000, pairs)), axis=1)
        low, high = np.quantile(medians, (0.05, 0.95))
        for where, values in zip(("here", "there"), both, strict=True):
            record.figure(f"{figure}_{where}", np.median(values))
        record.figure(f"{figure}_ratio", np.median(ratios))
        record.figure(f"{figure}_ratio_low", low)
        record.figure(f"{figure}_ratio_high", high)
        if args.least:
            held = np.median(ratios) >= args.least or high >= 1
            record.target(f"{figure}_holds", held, "==", 1)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--against", required=True, help="commit to compare with")
    parser.add_argument("--pairs", type=int, default=9, help="runs of each side (default 9)")
    parser.add_argument("--figures", nargs="+", required=True, help="names of figures of the benchmark")
    parser.add_argument("--least", type=float, default=0.0, help="least median ratio; 0: no target")
    parser.add_argument(
        "benchmark", nargs=argparse.REMAINDER, help="-- a script beside this one, and its options"
    )


if __name__ == "__main__":
    main(__doc__, measure, arguments)
