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
    """Line and text of each string that one of CHECKS is given, itself or by `parametrize`, with more than LONGEST words
    between two `|`.
    """
    tree = ast.parse(source)
    patterns = [value for call in ast.walk(tree) for value in _patterns(call)]
    for test in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        used = {
            name.id
            for call in ast.walk(test)
            for value in _patterns(call)
            for name in ast.walk(value)
            if isinstance(name, ast.Name)
        }
        patterns += [value for each in test.decorator_list for name, value in _cells(each) if name in used]
    texts = [(value.lineno, _text(value)) for value in patterns]
    return [each for each in texts if any(len(_WORD.findall(part)) > LONGEST for part in each[1].split("|"))]


_WORD = re.compile(r"[^\W_][\w'./:=-]*")


def _name(call: ast.AST) -> str:
    if not isinstance(call, ast.Call):
        return ""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _patterns(call: ast.AST) -> list[ast.expr]:
    """The words or patterns that a call of one of CHECKS is given."""
    if not isinstance(call, ast.Call) or _name(call) not in CHECKS:
        return []
    keyword = CHECKS[_name(call)]
    return [each.value for each in call.keywords if each.arg == keyword] if keyword else call.args


def _cells(decorator: ast.expr) -> list[tuple[str, ast.expr]]:
    """The values of a `parametrize` table that is written out, each with the name of its column."""
    if not isinstance(decorator, ast.Call) or _name(decorator) != "parametrize":
        return []
    columns, table, *_ = (*decorator.args, ast.Constant(None), ast.Constant(None))
    titles = columns.elts if isinstance(columns, ast.Tuple | ast.List) else [columns]
    names = [each.value for each in titles if isinstance(each, ast.Constant)]
    found = []
    for row in table.elts if isinstance(table, ast.Tuple | ast.List) else []:
        given = row.args if isinstance(row, ast.Call) and _name(row) == "param" else [row]
        if len(names) > 1 and isinstance(given[0], ast.Tuple | ast.List):
            given = given[0].elts
        found += list(zip(names, given, strict=False))
    return found


def _text(value: ast.expr) -> str:
    parts = (each.value for each in ast.walk(value) if isinstance(each, ast.Constant))
    return "".join(part for part in parts if isinstance(part, str))


def test_no_test_freezes_a_sentence_of_a_message():
    long = [
        f"{path.relative_to(HERE.parent)}:{line}: {text!r}"
        for path in sorted(HERE.rglob("*.py"))
        for line, text in sentences(path.read_text())
    ]
    assert not long, (
        "name the option, value, file or column (tests/refusals.py), not the sentence:\n" + "\n".join(long)
    )


TABLE = """
@pytest.mark.parametrize({}, {})
def test_it(a, said):
    with refused("--rows", said):
        f(a)
"""


def test_a_sentence_is_seen_wherever_it_stands():
    for code in (
        "with pytest.raises(UserError, match='--rows -1 is no number of rows'): f()",
        "with pytest.raises(UserError, match=rf'{path}: .* was made of other (images|texts)'): f()",
        "with pytest.warns(UserWarning, match='2 records have bytes of another encoding'): f()",
        "with refused('--rows', 'is no number of any rows'): f()",
        "assert names(err, 'the cluster has no more room')",
        TABLE.format("('a', 'said')", "[(1, 'is no number of any rows')]"),
        TABLE.format("'said'", "('--rows', f'{path}: holds a table of other rows')"),
        TABLE.format("['a', 'said']", "[pytest.param(1, 'is no number of any rows', id='x')]"),
    ):
        assert sentences(code), code
    for code in (
        "with pytest.raises(UserError, match=r'--rows .*-1'): f()",
        "with pytest.raises(ValueError, match='one of|fit|holds|told apart|apart along'): f()",
        "with refused('--rows', -1, path / 'a'): f()",
        "f(match='a sentence that is no pattern of a message')",
        TABLE.format("('said', 'a')", "[('--rows', 'a sentence that the test writes')]"),
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
