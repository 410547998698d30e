"""Refusals and failures in tests: which error, what its line names, and that it is one line. No test freezes a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from capfilt.errors import RunError, UserError


def names(line: str, *said: object) -> bool:
    """Whether every word of `said` stands in `line` as a whole word: `--mix` is not in `--mixed`, 5 not in 15, -5 or 0.5."""
    return all(_whole(word).search(line) for each in said for word in str(each).split())


def _whole(word: str) -> re.Pattern[str]:
    before = (
        r"(?<![\w-])(?<!\d\.)" if re.match(r"\d", word) else r"(?<![\w-])" if re.match(r"\w", word) else ""
    )
    after = (
        r"(?![\w-])(?!\.\d)" if re.search(r"\d$", word) else r"(?![\w-])" if re.search(r"\w$", word) else ""
    )
    return re.compile(before + re.escape(word) + after)


@contextmanager
def refused(*said: object, error: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The code inside raises `error` (UserError: exit code 2) with one line that names every word of `said`.

    Give what the line must quote: the option, its value, a file, part or column, and at most a term that tells this
    refusal from the others of the same call.
    """
    with pytest.raises(error) as caught:
        yield caught
    line = str(caught.value)
    assert "\n" not in line, line
    assert names(line, *said), f"not all of {[str(each) for each in said]} in: {line}"


def failed(*said: object) -> AbstractContextManager[pytest.ExceptionInfo[Exception]]:
    """As `refused`, for a run that failed: RunError, exit code 1."""
    return refused(*said, error=RunError)
