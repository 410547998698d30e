"""The server of these tests, and the child process they share."""

from __future__ import annotations

import pytest

from capfilt.stages.download.worker import close_shared_worker
from tests.stages.download.web import (
    Server,
)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def one_child():
    """The child process is shared by this module's tests: its imports take seconds."""
    yield
    close_shared_worker()
