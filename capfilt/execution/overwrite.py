"""`--overwrite`: removes what stands where a stage writes, once somebody has agreed.

It removes no input, and nothing that capfilt did not write.

Not here: which folders a stage's output is (`stages/base.py`, `outputs`).
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capfilt.errors import RunError, UserError, naming
from capfilt.options import PARTS
from capfilt.stages.base import ModelStage, ShardStage
from capfilt.tables.visible import visible
from capfilt.tables.workspace import Workspace, as_path
from capfilt.training.launched import started_together


def clear(stage: ShardStage | ModelStage, options: Any, workspace: Workspace, *, agreed: bool) -> None:
    """Remove the output of `stage` that stands, if any; `agreed`: without asking.

    Raises UserError where it must not be removed, or nobody can be asked; RunError where the answer is no.
    """
    if isinstance(stage, ShardStage) and not stage.outputs():
        raise UserError(f"--overwrite: this adds to {stage.output.path}, which must stand; leave it out")
    standing = stage.standing()
    if not standing:
        return
    if started_together():
        raise UserError(f"--overwrite: not under torchrun; remove {standing[0]} before")
    kept = [workspace.path, Path.cwd(), *_inputs(options, workspace)]
    for path in standing:
        if path.is_symlink():
            raise UserError(f"--overwrite: {path} is a link, which is left alone; remove it yourself")
        for other in kept:
            if other.resolve().is_relative_to(path.resolve()):
                raise UserError(
                    f"--overwrite: {path} holds {other}, which this run needs; name another --out"
                )
    names = " and ".join(map(str, standing))
    if not agreed:
        _ask(names)
    for path in standing:
        with naming(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _ask(names: str) -> None:
    if not sys.stdin.isatty():
        raise UserError(f"--overwrite would remove {names}; nobody can be asked here, so give --yes too")
    print(visible(f"remove {names}? [y/N] "), end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RunError(f"{names}: left as it is")


def _inputs(options: Any, workspace: Workspace) -> Iterator[Path]:
    """Everything that the stage reads and an option may name."""
    for field in dataclasses.fields(options):
        kind, value = field.metadata["kind"], getattr(options, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            # Of `verdicts`, an item names two parts: of the images, and of the verdicts.
            for name in filter(None, text.split("=") if kind else ()):
                if kind == "path" or "://" in name:
                    yield Path(name)
                    continue
                tables = ("images", kind) if kind in PARTS else ("models",)
                # Of a plug-in's, `clip:DIR`, the directory.
                for each in {name, name.rpartition(":")[2]}:
                    yield from [as_path(each)] if "/" in each else [workspace.path / t / each for t in tables]
