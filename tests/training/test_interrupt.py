"""Bugs caught here: Ctrl-C, which a terminal and a launcher both deliver, taken for two and ending a run before it has saved; a
signal that comes while ranks save because they agreed to; a second one, meant, that is ignored.
"""

from __future__ import annotations

import signal

import pytest

from capfilt.training import interrupt
from capfilt.training.interrupt import Interrupt, Interrupted


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    received = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    yield now, received
    signal.signal(signal.SIGINT, before)


def listens(listener, *steps):
    with listener.listening(True):
        for step in steps:
            step()


def sent(number):
    return lambda: signal.raise_signal(number)


def test_the_same_signal_counts_once_for_five_seconds(clock):
    now, received = clock
    listener = Interrupt()
    interrupted = sent(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        listens(listener, interrupted, lambda: now.append(now.pop() + 4.9), interrupted, listener.check)
    # Raised again on leaving, once.
    assert received == [signal.SIGINT]


@pytest.mark.parametrize(("later", "number"), [(5.1, signal.SIGINT), (0.0, signal.SIGTERM)])
def test_another_one_ends_the_run_at_once(clock, later, number):
    now, received = clock
    reached = []
    with pytest.raises(KeyboardInterrupt) as ended:
        listens(
            Interrupt(), sent(signal.SIGINT), lambda: now.append(now.pop() + later), sent(number),
            lambda: reached.append(True),
        )  # fmt: skip
    assert not reached
    assert not isinstance(ended.value, Interrupted)
    assert received == []


def test_a_signal_after_an_agreed_stop_is_the_first(clock):
    _, received = clock
    listener = Interrupt(alone=False)

    def saves():
        try:
            listener.check()
        except Interrupted:
            signal.raise_signal(signal.SIGINT)  # while the state is written
            raise

    with pytest.raises(KeyboardInterrupt):
        listens(listener, lambda: listener.agree(True), saves)
    assert received == [signal.SIGINT]


def test_ranks_stop_where_they_agreed_and_not_before(clock):
    listener = Interrupt(alone=False)
    listener.ask()
    listener.check()
    listener.agree(True)
    with pytest.raises(Interrupted):
        listens(listener, listener.check)
