"""The log of a training run: a JSON object per line, cut back where a resumed run writes lines again; and TensorBoard.

Not here: which figures make a line and when it is written (`loop.py`), what they are watched for (`watch.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import UserError


class Log:
    """Appends lines to `path`, and the same figures to TensorBoard event files; neither where None.

    `step` is where the run begins: lines of later steps, which it will write again, and a torn last line are dropped;
    a run from step 0 starts an empty log. TensorBoard's writer opens a new file and hides the later steps of older ones.

    Raises UserError where `tensorboard` is a directory and the package is missing.
    """

    def __init__(self, path: Path | None, step: int, tensorboard: Path | None = None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate(path, step)
        self.writer: Any = None
        if tensorboard is not None:
            check_tensorboard()
            module = importlib.import_module("torch.utils.tensorboard")
            self.writer = module.SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, line: Mapping[str, float]) -> None:
        """One line, which has a "step". ValueError for a figure that is not finite: JSON has no such numbers."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                if name != "step":
                    self.writer.add_scalar(name, value, global_step=int(line["step"]))
            # A reader sees a line when it is written, and a killed process loses none.
            self.writer.flush()

    def close(self) -> None:
        """Closes TensorBoard's file; nothing else is open between lines."""
        if self.writer is not None:
            self.writer.close()


def check_tensorboard() -> None:
    """UserError, in one line with the remedy, where the `tensorboard` package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "TensorBoard is not installed: pip install 'capfilt[tensorboard]', or train without it"
        )


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
