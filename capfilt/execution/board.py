"""A piece of work on a Ray cluster and the run that waits for it, in touch by a board. Placing the work is ray.py's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from capfilt.errors import RunError
from capfilt.execution.cluster import here, ray
from capfilt.stages.base import ModelStage, Report
from capfilt.training.interrupt import PATIENCE, Interrupt, Interrupted


class Board:
    """An actor without a processor, on which a piece of work posts how far it is, what came out, and why it failed."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, dict[str, Any]] = (0, 0, {})
        self.result: dict[str, Any] | None = None
        self.failure: Exception | None = None
        self.asked = False
        self.began = False

    def begin(self) -> None:
        self.began = True

    def begun(self) -> bool:
        return self.began

    def ask(self) -> None:
        """Has the next post answered by True: stop."""
        self.asked = True

    def post(self, step: int, total: int, figures: dict[str, Any]) -> bool:
        self.latest = (step, total, figures)
        return self.asked

    def finish(self, result: dict[str, Any]) -> None:
        self.result = result

    def fail(self, failure: Exception) -> None:
        self.failure = failure

    def read(self) -> tuple[int, int, dict[str, Any]]:
        return self.latest

    def end(self) -> tuple[dict[str, Any] | None, Exception | None]:
        return self.result, self.failure


def run_and_post(stage: ModelStage, board: Any) -> Mapping[str, Any] | None:
    """Runs the stage, telling the board now and then how far it is; None where it was asked to stop."""
    board.begin.remote()
    last = 0.0

    def report(step: int, total: int, figures: Mapping[str, Any]) -> bool:
        nonlocal last
        if time.monotonic() - last <= 0.5:
            return False
        last = time.monotonic()
        return bool(ray.get(board.post.remote(step, total, dict(figures))))

    try:
        return stage.run(report)
    except Interrupted:
        return None


def attend(
    stage: ModelStage, board: Any, report: Report, ended: Callable[[float], bool], check: Callable[[], None]
) -> None:
    """Returns when `ended`, which waits for so many seconds, says so, and reports until then.

    A first signal, or an error from `check`, asks a stage that saves to stop, and is raised when it has, or `PATIENCE` is
    over; a stage that does not, or has done nothing yet, and a second signal end it at once.
    """
    interrupt = Interrupt()
    stop: Exception | None = None
    asked = 0.0
    with interrupt.listening(True):
        while not ended(0.5):
            step, total, figures = ray.get(board.read.remote())
            if step:
                report(step, total, figures)
            try:
                check()
            except RunError as error:
                stop = error
            if interrupt.number is None and stop is None:
                continue
            if not (step and stage.saves()) or (asked and time.monotonic() - asked > PATIENCE):
                break
            if not asked:
                asked = time.monotonic()
                ray.get(board.ask.remote())
    if stop is not None:
        raise stop


def new_board() -> Any:
    """A board on the driver's node, so that no other node's death takes it along."""
    return (
        ray.remote(Board)
        .options(num_cpus=0, scheduling_strategy=here(), max_restarts=-1, max_task_retries=-1)
        .remote()
    )
