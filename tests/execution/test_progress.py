"""Would catch: a stage's output that colours the terminal it is shown on, or that ends the run as markup."""

from __future__ import annotations

import io
import sys

import pytest

from capfilt.execution import progress
from capfilt.execution.progress import StageProgress

NAMES = ["retrain a[1]", "retrain [/red]", "retrain [bold]b", "retrain \x1b]0;owned\x07"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(monkeypatch, name, stream):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    monkeypatch.setenv("COLUMNS", "200")
    with StageProgress(name, 2, "shards") as shown:
        shown.update(1, figures={name: 0.5})
        if shown._bar is not None:
            shown._bar.refresh()
    text = err.getvalue()
    assert "\x1b]" not in text
    assert "\x07" not in text
    assert text.count(name.replace("\x1b", r"\u001b").replace("\x07", r"\u0007")) >= 2
