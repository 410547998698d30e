"""Counts what must not grow: deep stages, long files, long help. `just check` runs it: it fails on any that is not listed.

Not here: the floors (pyproject.toml, import-linter), and how sentences read (docs/STYLE.md).
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

ABSTRACT = {"ShardStage", "ModelStage"}
MOST_ABOVE, MOST_LINES, MOST_HELP = 2, 500, 90
"""Of capfilt's classes between a stage and the abstract one; of a file's lines; of a help text's characters."""

DEEP: dict[str, str] = {}
"""Known stages that are deeper, and why."""

LONG = {
    "capfilt/data/pairs.py": "one pair source: order, crops, cache and resume hold each other up",
    "capfilt/formats/records.py": "one record reader for CSV, JSON and Parquet, with all its refusals",
    "capfilt/tables/shards.py": "the one place that commits rows",
}
"""Files that are longer, and why."""


def stage_bases(folder: Path) -> dict[str, list[str]]:
    """The bases of every class in the Python files of a folder, by name."""
    trees = (ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py")))
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    # Behind a subscript or a module stands the name: Training[T], base.ShardStage.
    return {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases] for node in nodes
    }


def above(name: str, bases: dict[str, list[str]]) -> list[str]:
    """The longest chain of classes over `name`, below the abstract one, which is its last; empty for no stage."""
    chains = [
        [base, *above(base, bases)] for base in bases.get(name, ()) if base in ABSTRACT or above(base, bases)
    ]
    return max(chains, key=len, default=[])


def deep(root: Path = ROOT) -> dict[str, str]:
    """Stages with more than MOST_ABOVE classes between them and the abstract one: those classes."""
    bases = stage_bases(root / "capfilt" / "stages")
    chains = {name: above(name, bases)[:-1] for name in bases}
    return {name: " < ".join(chain) for name, chain in chains.items() if len(chain) > MOST_ABOVE}


def long_files(root: Path = ROOT) -> dict[str, str]:
    """Python files of more than MOST_LINES lines: how many."""
    files = {path.relative_to(root).as_posix(): path for path in sorted((root / "capfilt").rglob("*.py"))}
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    return {name: f"{count} lines" for name, count in lines.items() if count > MOST_LINES}


def code_lines(root: Path = ROOT) -> int:
    """Lines of capfilt/ without blank ones, comments, docstrings and imports."""
    total = 0
    for path in (root / "capfilt").rglob("*.py"):
        text = path.read_text()
        apart: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.Import | ast.ImportFrom) or words:
                apart.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = enumerate(map(str.strip, text.splitlines()), start=1)
        total += sum(bool(line) and line[0] != "#" and number not in apart for number, line in lines)
    return total


def helps() -> Iterator[tuple[str, str]]:
    """Every option of every command, with its help text as it is declared."""
    import typer

    from capfilt.cli import build_app
    from capfilt.commands import EXAMPLES
    from capfilt.stages.registry import STAGES

    for command in STAGES:
        for each in dataclasses.fields(command.options):
            yield f"{' '.join(command.words)} {each.name}", each.metadata["help"]
    shared = STAGES[0].words
    for words in (shared, *(tuple(name.split()) for name in EXAMPLES)):
        found: Any = typer.main.get_command(build_app(words))
        for word in words:
            found = found.commands[word]
        own = {each.name for each in dataclasses.fields(STAGES[0].options)} if words == shared else set()
        for parameter in found.params:
            if parameter.name not in own:
                yield f"{' '.join(words)} {parameter.name}", parameter.help or ""


def long_helps() -> dict[str, str]:
    """Help texts of more than MOST_HELP characters."""
    return {name: f"{len(text)} characters: {text}" for name, text in helps() if len(text) > MOST_HELP}


def faults(found: dict[str, str], known: dict[str, str]) -> list[str]:
    """A line for each that is found and not known, and for each that is known and not found any more."""
    new = [f"{name}: {words}" for name, words in found.items() if name not in known]
    return new + [f"{name}: no longer one; take it off the list" for name in known if name not in found]


def main() -> int:
    """Print the counts, and whatever is not listed. Returns the exit code."""
    counts = (
        (f"stages with more than {MOST_ABOVE} classes above them", deep(), DEEP),
        (f"files of more than {MOST_LINES} lines", long_files(), LONG),
        (f"help texts of more than {MOST_HELP} characters", long_helps(), {}),
    )
    wrong = [(title, faults(found, known)) for title, found, known in counts]
    for title, found, _ in counts:
        print(f"{len(found):3} {title}")
    print(f"{code_lines()} lines of code")
    for title, lines in wrong:
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
    return 1 if any(lines for _, lines in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
