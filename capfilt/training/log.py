"""The log of a training run: a JSON object per line, cut back where a resumed run writes lines again.

Not here: which figures make a line and when it is written (`loop.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class Log:
    """Appends lines to `path`; nothing at all where that is None.

    `step` is where the run begins: lines of later steps, which it will write again, and a torn last line are dropped;
    a run from step 0 starts an empty log.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate(path, step)

    def write(self, line: Mapping[str, float]) -> None:
        """One line. ValueError for a figure that is not finite: JSON has no such numbers."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


def _truncate(path: Path, step: int) -> None:
    kept = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] > step:
                    continue
            except (ValueError, KeyError, TypeError):
                continue
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
