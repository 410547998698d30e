"""Catches an error of the system that reaches people without the name of the file it is about."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from capfilt.errors import MissingInput, RunError, UserError, naming


@pytest.mark.parametrize("path", ["a/b.parquet", Path("a/b.parquet")])
def test_an_error_without_a_file_gets_one_and_an_error_with_one_keeps_it(path):
    with pytest.raises(OSError, match=r"a/b\.parquet") as caught, naming(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.filename == "a/b.parquet"
    with pytest.raises(FileNotFoundError) as caught, naming(path):
        Path("/nowhere/at all").stat()
    assert caught.value.filename == "/nowhere/at all"


def test_other_errors_pass_and_a_missing_input_is_the_users():
    with pytest.raises(ZeroDivisionError), naming("x"):
        raise ZeroDivisionError
    # The command line ends with 2 for the one family, with 1 for the other.
    assert issubclass(MissingInput, UserError)
    assert not issubclass(RunError, UserError)
