"""Runs a stage in several processes of a Ray cluster that train together: Ray Train's TorchTrainer.

Ray places the ranks, tells them of each other, and starts all of them again where one is lost; what they saved on the
workspace is what they go on from. Not here: stages in one process (`ray.py`), ranks on one machine without Ray
(`together.py`).
"""

from __future__ import annotations

import ipaddress
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayTaskError, WorkerCrashedError

from capfilt.errors import RunError, UserError
from capfilt.execution.board import attend, new_board, run_and_post
from capfilt.execution.cluster import NoRoom, Wait, here, ray
from capfilt.execution.placement import Size
from capfilt.execution.together import keep_to_loopback, meeting_point
from capfilt.stages.base import ModelStage, Report
from capfilt.training.launched import launched_rank

_store: Any = None

RESTARTS = 2
"""So often all ranks are started again after one was lost."""


def _rank(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    torch.set_num_threads(settings["threads"])
    board = settings["board"]
    if ray.get(board.end.remote())[1] is not None:
        # Ray starts everyone again whatever happened, and what a rank has already explained would happen again.
        return
    try:
        figures = run_and_post(settings["stage"], board)
    except (UserError, RunError) as error:
        ray.get(board.fail.remote(error))
        raise
    if launched_rank() == 0 and figures is not None:
        ray.get(board.finish.remote(dict(figures)))


def _meet() -> tuple[str, int]:
    """On rank 0: where the ranks find each other, on its node's own address."""
    global _store  # noqa: PLW0603 - the process of a rank keeps it for as long as it lives
    host = ray.util.get_node_ip_address()
    _store = meeting_point(host)
    return host, _store.port


def _prepare(host: str, port: int) -> None:
    """On each rank: the environment that torchrun would give it."""
    from ray.train import get_context

    context = get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()), "LOCAL_RANK": str(context.get_local_rank()),
        "WORLD_SIZE": str(context.get_world_size()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": host, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    if ipaddress.ip_address(host).is_loopback:
        keep_to_loopback()


def _fit(size: Size, name: str, scratch: Path, settings: dict[str, Any]) -> None:
    """What starts and watches the ranks, in a process of its own: no signal reaches Ray Train there, whose answer would be to
    end the ranks in the middle of a step, and to give up all that it has begun is to end that process.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class Meeting(Backend):
        """In place of Ray Train's own, whose store listens on every address: ranks join by themselves, as under torchrun."""

        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            host, port = worker_group.execute_single(0, _meet)
            worker_group.execute(_prepare, host, port)

    class Config(TorchConfig):
        """Ray Train's, with that backend."""

        backend_cls = Meeting

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TorchTrainer(
            _rank,
            train_loop_config=settings,
            torch_config=Config(),
            scaling_config=ScalingConfig(
                num_workers=size.workers,
                use_gpu=size.gpu,
                resources_per_worker={"CPU": size.cpus, **({"GPU": 1} if size.gpu else {})},
            ),
            run_config=RunConfig(
                name=name, storage_path=str(scratch), failure_config=FailureConfig(max_failures=RESTARTS)
            ),
        ).fit()


def missing() -> str:
    """What to do where Ray Train is not installed with all that it needs; "" where it is."""
    try:
        import ray.train.torch  # noqa: F401
    except ImportError as error:
        return f"pip install 'capfilt[train]' ({error})"
    return ""


def run_on_ray(
    stage: ModelStage,
    size: Size,
    report: Report,
    check: Callable[[], None],
    patience: float = math.inf,
) -> Mapping[str, Any]:
    """`stage.run` in workers of the connected cluster, as many and as large as `size` says.

    Returns what rank 0 returned. Raises what a rank raised, where it is an error of ours; RunError where ranks were lost
    more than twice, or none had begun after `patience` seconds, or the nodes that are left have no room for them;
    KeyboardInterrupt where they were stopped. `check` is `attend`'s.
    """
    board = new_board()
    scratch = Path(stage.output) / "ray_train"
    settings = {"stage": stage, "board": board, "threads": max(1, int(size.cpus))}
    run = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here())
    fitting = run.remote(size, stage.output.name, scratch.resolve(), settings)
    wait = Wait(stage.name, patience)
    begun = False

    def placed() -> None:
        nonlocal begun
        begun = begun or ray.get(board.begun.remote())
        # Ray Train waits for ever for nodes that are gone.
        wait.look(size, size.workers, begun)
        check()

    lost = ""
    try:
        attend(stage, board, report, lambda seconds: bool(ray.wait([fitting], timeout=seconds)[0]), placed)
        ray.get(fitting)
    except RayTaskError as error:
        lost = str(error.cause).splitlines()[0]
    except WorkerCrashedError as error:
        lost = str(error).splitlines()[0]
    except NoRoom as error:
        ray.cancel(fitting, force=True)
        raise RunError(
            f"{stage.name}: the nodes that are left have no room for {size}; {error}; run again with fewer --ranks to go on "
            "from the last state"
        ) from error
    except BaseException:
        ray.cancel(fitting, force=True)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result, failure = ray.get(board.end.remote())
    if failure is not None:
        raise failure
    if lost:
        raise RunError(
            f"{stage.name}: ranks were lost {RESTARTS + 1} times ({lost}); run again to go on from the last state"
        )
    if result is None:
        raise KeyboardInterrupt
    return dict(result)
