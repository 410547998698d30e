"""Would catch: a test that freezes a sentence of a message, which then nobody can improve without changing tests.

A test of a refusal names the option, the value, the file or the column, and the error that decides the exit code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from capfilt.errors import RunError, UserError
from tests.refusals import failed, names, refused

HERE = Path(__file__).resolve().parent
CHECKS = {"raises": "match", "warns": "match", "refused": None, "failed": None, "names": None}
"""Each function that reads a message, and the keyword that holds a pattern; None: every argument is words."""
LONGEST = 4


def sentences(source: str) -> list[tuple[int, str]]:
    """Line and text of each string that one of CHECKS is given, with more than LONGEST words between two `|`."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in CHECKS:
            continue
        keyword = CHECKS[name]
        for value in [each.value for each in call.keywords if each.arg == keyword] if keyword else call.args:
            text = "".join(
                part.value
                for part in ast.walk(value)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
            if any(len(re.findall(r"[^\W_][\w'./:=-]*", each)) > LONGEST for each in text.split("|")):
                found.append((value.lineno, text))
    return found


def test_no_test_freezes_a_sentence_of_a_message():
    long = [
        f"{path.relative_to(HERE.parent)}:{line}: {text!r}"
        for path in sorted(HERE.rglob("*.py"))
        for line, text in sentences(path.read_text())
    ]
    assert not long, (
        "name the option, value, file or column (tests/refusals.py), not the sentence:\n" + "\n".join(long)
    )


def test_a_sentence_is_seen_wherever_it_stands():
    for code in (
        "with pytest.raises(UserError, match='--rows -1 is no number of rows'): f()",
        "with pytest.raises(UserError, match=rf'{path}: .* was made of other (images|texts)'): f()",
        "with pytest.warns(UserWarning, match='2 records have bytes of another encoding'): f()",
        "with refused('--rows', 'is no number of any rows'): f()",
        "assert names(err, 'the cluster has no more room')",
    ):
        assert sentences(code), code
    for code in (
        "with pytest.raises(UserError, match=r'--rows .*-1'): f()",
        "with pytest.raises(ValueError, match='one of|fit|holds|told apart|apart along'): f()",
        "with refused('--rows', -1, path / 'a'): f()",
        "f(match='a sentence that is no pattern of a message')",
    ):
        assert not sentences(code), code


def test_names_wants_whole_words():
    line = "--mixed 15: images/web-2 has no column 'score' (0.5)"
    assert names(line, "--mixed 15", "images/web-2", "score", 0.5)
    for other in ("--mix", 5, "web", "scor", -15, "col", "--mixed 16", 0.55):
        assert not names(line, other), other


@pytest.mark.parametrize(
    ("check", "error"),
    [
        (refused("--rows"), RunError("--rows 5")),
        (failed("--rows"), UserError("--rows 5")),
        (refused("--rows"), UserError("--rows 5\nand more")),
        (refused("--rows", 6), UserError("--rows 5")),
    ],
    ids=["exit code 1 for 2", "exit code 2 for 1", "two lines", "another value"],
)
def test_another_refusal_is_not_taken_for_this_one(check, error):
    with pytest.raises((AssertionError, UserError, RunError)), check:
        raise error
