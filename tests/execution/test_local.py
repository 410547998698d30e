"""Catches a run on this machine that others on the network or on the machine can reach, or that outlives a killed driver."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from capfilt.execution.run import executor
from tests.refusals import refused

ROOT = Path(__file__).resolve().parents[2]

# Ray is imported first, as a plug-in may do: it reads its environment only then.
DRIVER = """
import ray, sys
from pathlib import Path
from capfilt.execution.ray import RayExecutor
from capfilt.execution.run import run_stage
from tests.execution.cluster_run import Rows
with RayExecutor() as work:
    print(ray.get_runtime_context().gcs_address, flush=True)
    run_stage(Rows(Path(sys.argv[1]), "held", 2, held=True), work, quiet=True)
"""
# On this machine, told how to reach the loopback.
STRANGER = """
from capfilt.errors import UserError
from capfilt.execution.run import executor
try:
    with executor("ray"):
        print("let in")
except UserError as error:
    print(error)
"""


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def living(processes):
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is looked at, spoken to by a stranger, and killed. On the host's own network, where it may do wrong."""
    root = tmp_path_factory.mktemp("local")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(), start_new_session=True,
    )  # fmt: skip
    address = driver.stdout.readline().strip()
    deadline = time.monotonic() + 120
    while len(list(root.glob("held/*.begun"))) < min(2, os.cpu_count()):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    names = [process.name() for process in processes]
    tokens = {process.environ().get("RAY_AUTH_TOKEN", "") for process in processes} - {""}
    shown = [
        process.name() for process in processes if any(token in str(process.cmdline()) for token in tokens)
    ]
    sockets = [
        (process.name(), each.laddr.ip)
        for process in processes
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM
    ]
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=environment(RAY_ADDRESS=address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_NUM_REDIS_GET_RETRIES="3"),
    )  # fmt: skip
    driver.kill()
    driver.communicate()
    killed = time.monotonic()
    while (left := living(processes)) and time.monotonic() - killed < 20:
        time.sleep(0.1)
    return SimpleNamespace(
        tokens=tokens,
        shown=shown,
        names=names,
        sockets=sockets,
        stranger=stranger,
        left=[each.name() for each in left],
    )


def test_everything_listens_on_the_loopback_only(run):
    assert {"gcs_server", "raylet"} <= {name for name, _ in run.sockets}
    outside = [
        (name, ip)
        for name, ip in run.sockets
        if not (
            getattr(ipaddress.ip_address(ip), "ipv4_mapped", None) or ipaddress.ip_address(ip)
        ).is_loopback
    ]
    assert not outside


def test_who_has_not_the_token_is_refused(run):
    assert "RAY_AUTH_TOKEN" in run.stranger.stdout, run.stranger.stderr
    assert len(run.tokens) == 1
    assert not run.shown  # command lines are for everyone to read


def test_no_process_outlives_a_killed_driver(run):
    assert {"gcs_server", "raylet"} <= set(run.names)
    assert sum(name.startswith("ray::") for name in run.names) >= 2  # workers; newer agents too
    assert not run.left


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "localhost:9", "no-such-host.invalid:6379"])
def test_an_address_where_nothing_listens_is_said_at_once(address, monkeypatch):
    """Ray itself tries for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with refused(f"RAY_ADDRESS={address}"), executor("ray"):
        pass
    assert time.monotonic() - start < 15
