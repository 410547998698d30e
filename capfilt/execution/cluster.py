"""The Ray that stages run on: the cluster at RAY_ADDRESS, or one of this run alone on this machine's loopback.

Here: connecting and leaving, what the nodes have, and waiting for room on them. Not here: what runs there (`ray.py`,
`ray_train.py`), how large it may be (`placement.py`). These three modules are the only ones that import Ray.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

# Before the import: Ray reads it once.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
import ray as _ray
from ray.exceptions import (
    AuthenticationError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from capfilt.errors import RunError, UserError
from capfilt.execution.placement import Node, Size, seats
from capfilt.formats.places import first_line
from capfilt.tables.visible import say

# Ray's stubs know the types of remote functions but not those of actors' methods.
ray: Any = _ray

LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
"""How Ray says that a worker is gone, whatever it was doing."""

SAID_AFTER = 30.0
"""Seconds of waiting for room until it is said; said again after twice as long, and so on."""

_LOOK = 5.0
"""Seconds between looks at what nodes have while something waits for them."""

# After a kill Ray's agents stay for a minute. The first line on stdin has the pids of all that Ray started; stdin ends with
# the driver, however the driver ends. psutil kills no process that got such a pid later.
_GUARD = """
import contextlib, sys, psutil
left = []
for pid in sys.stdin.readline().split():
    with contextlib.suppress(psutil.NoSuchProcess):
        left.append(psutil.Process(int(pid)))
sys.stdin.read()
for process in left:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
"""


class NoRoom(Exception):
    """No node that is there can hold what waits; the text says what the nodes have."""


class Connection:
    """Connects to the cluster at RAY_ADDRESS, or starts a Ray on this machine; a context manager.

    A Ray started here listens on the loopback only, asks for a token that this run alone has, and ends with the run.
    """

    def __init__(self) -> None:
        self._started = False
        self._guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if ray.is_initialized():
            return self
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        address = os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            _keep_to_this_machine()
            options |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
        _call(address)
        try:
            # Always an address: asked for none, Ray would join whatever cluster it finds running on this machine.
            ray.init(address=address, **options)
        except (ConnectionError, AuthenticationError) as error:
            raise UserError(
                f"RAY_ADDRESS={address}: the cluster does not let this run in ({first_line(error)}); if it has a token, set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from error
        self._started = True
        if address == "local":
            self._guard = _guard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            ray.shutdown()
        if self._guard is not None:
            self._guard.communicate()


def _call(address: str) -> None:
    """Raises UserError where nothing listens at HOST:PORT: Ray itself tries for minutes without a word."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error


def _keep_to_this_machine() -> None:
    """Has the Ray that this process starts listen on the loopback only and ask for a token of this run's own."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    os.environ |= {
        # Ray listens on the address that it takes for the node's own. This is its switch for the loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        # Not Ray's own token: ~/.ray/auth_token outlives the run, and others may be able to read it.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    # A plug-in may have imported Ray, which reads these once.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _guard() -> subprocess.Popen[str]:
    """Starts the process that kills what Ray started here when this process is gone."""
    started = psutil.Process().children(recursive=True)
    command = [sys.executable, "-c", _GUARD]
    # A session of its own: Ctrl-C and a killed process group do not reach it.
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert guard.stdin is not None
    guard.stdin.write(" ".join(str(process.pid) for process in started) + "\n")
    guard.stdin.flush()
    return guard


def nodes() -> list[Node]:
    """The processors and GPUs of each living node."""
    return [
        (each["Resources"].get("CPU", 0), each["Resources"].get("GPU", 0))
        for each in ray.nodes()
        if each["Alive"]
    ]


def described(there: list[Node]) -> str:
    """The nodes, for people."""
    return "nodes (processors, GPUs): " + ", ".join(f"({cpus:g}, {gpus:g})" for cpus, gpus in there)


def here() -> NodeAffinitySchedulingStrategy:
    """Places what must outlive other nodes on the driver's own."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def autoscaled() -> bool:
    """Whether something adds nodes to the cluster for what waits: Ray's autoscaler, with types of nodes to choose from."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
    from ray.experimental.internal_kv import _internal_kv_get

    # Newer autoscalers report their state, and nodes know their type; older ones write a report of types. Where nodes were
    # started by hand, both call the type of each `node_` and its id.
    client = GcsClient(ray.get_runtime_context().gcs_address)
    status = GetClusterStatusReply.FromString(client.get_cluster_status())
    types: set[str] = set()
    if status.HasField("autoscaling_state"):
        types = {node.ray_node_type_name for node in status.cluster_resource_state.node_states}
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
    types |= set(report.get("active_nodes", ()))
    by_hand = {f"node_{node['NodeID']}" for node in ray.nodes()}
    return bool(types - by_hand - {""})


class Wait:
    """Waiting for workers to begin.

    Args:
        name: the stage's.
        patience: seconds after which waiting is a RunError.
    """

    def __init__(self, name: str, patience: float = math.inf) -> None:
        self._name, self._patience = name, patience
        self._start = self._looked = time.monotonic()
        self._said_after = SAID_AFTER

    def look(self, size: Size, at_once: int = 1, begun: bool = False) -> None:
        """Says that workers of this size are waited for when it is time to, unless they have `begun`.

        Raises NoRoom where the living nodes can never hold `at_once` of them, RunError after `patience` seconds.
        """
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            there = nodes()
            if seats(there, size.cpus, size.gpu) < at_once and not autoscaled():
                raise NoRoom(described(there))
        waited = now - self._start
        if begun:
            return
        if waited > self._patience:
            raise RunError(
                f"{self._name}: waited {self._patience:.0f} s for {size} to begin; {_free()}; run again when others are done, "
                "or give fewer --ranks"
            )
        if waited > self._said_after:
            self._said_after *= 2
            say(f"{self._name}: waits for {size} to begin; {_free()}", err=True)


def _free() -> str:
    """The free processors and GPUs, for people, and whether more may come."""
    free = ray.available_resources()
    text = f"free now, in all (processors, GPUs): ({free.get('CPU', 0):g}, {free.get('GPU', 0):g})"
    return text + ("; the cluster's autoscaler may add nodes" if autoscaled() else "")


def death(error: Exception) -> str:
    """How a worker was lost, for people. Ray learns of a node's death later than of its workers'."""
    if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
        return "its node ran out of memory"
    return "its worker or node died"
