"""Catches an answer that is asked for twice, a cache that grows without bound, and a fault that grows with each who asks."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from capfilt.stages.download.remembered import Remembered
from capfilt.stages.download.urls import Fault


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("error", [Fault, ValueError])
def test_a_remembered_error_does_not_grow_with_those_who_ask(error, transient):
    """Would catch: frames of every URL of a dead host, held by one exception for two minutes."""

    def ask(key):
        raise Fault("dns", key, transient=transient) if error is Fault else ValueError(key)

    answers = Remembered(ask, 9)
    lengths = []
    for _ in range(5):
        with pytest.raises(error) as caught:
            answers.get("host", time.monotonic() + 9)
        lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(set(lengths)) == 1


def test_who_comes_second_waits_for_the_first_and_not_for_ever():
    going, calls = threading.Event(), []

    def ask(key):
        calls.append(key)
        going.wait(9)
        return len(key)

    answers = Remembered(
        ask, 9, start=lambda work, *values: threading.Thread(target=work, args=values).start()
    )
    for _ in range(2):
        with pytest.raises(TimeoutError):
            answers.get("abc", time.monotonic() + 0.05)
    going.set()
    assert answers.get("abc", time.monotonic() + 9) == 3
    assert calls == ["abc"]


@pytest.mark.parametrize(("size", "kept"), [(1, 4), (2, 2), (9, 1)])
def test_the_sizes_of_answers_are_bounded_and_the_last_asked_for_stays(size, kept):
    calls = []
    answers = Remembered(lambda key: calls.append(key) or key, 4, size=lambda value: size)
    for key in range(8):
        answers.get(key, time.monotonic() + 9)
    assert len(answers._known) == kept
    answers.get(7, time.monotonic() + 9)
    assert calls == list(range(8))
