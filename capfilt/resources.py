"""Where the files are that travel with the code but are not code: recipes (`pipelines/`) and the schema (`schemas/`).

One resolver for a wheel, an sdist, an editable install and a plain checkout. What the files mean is not known here.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from capfilt.errors import RunError, UserError

_PACKAGE = Path(__file__).resolve().parent


def list_recipes() -> list[str]:
    """Names of the recipes that come with capfilt, sorted: the YAML files directly in `pipelines/`, without suffix.

    Folders below it hold what is not a recipe (cluster set-ups). Raises RunError for a broken install.
    """
    return sorted(path.stem for path in _directory("pipelines").glob("*.yaml"))


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a recipe: of one that comes with capfilt, by name, or of the user's own, by path.

    With a separator or a YAML suffix it is a path (`./mine`, `mine.yaml`); else it is a name (`quickstart`), so that a
    file or folder that happens to lie in the working directory never replaces a recipe. Raises UserError when there is
    no such recipe.
    """
    text = os.fspath(name_or_path)
    if os.sep in text or (os.altsep and os.altsep in text) or text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
        if path.is_file():
            return path.resolve()
        reason = "is a directory" if path.is_dir() else "no such file"
        raise UserError(f"recipe {text}: {reason}; {_suggestion(path.stem)}")
    known = list_recipes()
    if text not in known:
        raise UserError(f"recipe {text!r}: no recipe of that name; {_suggestion(text)}")
    return _directory("pipelines") / f"{text}.yaml"


def schema_dir() -> Path:
    """Returns the directory of the published contract: a CREATE TABLE per table, and `views.sql`.

    Raises RunError for a broken install.
    """
    return _directory("schemas")


def _directory(name: str) -> Path:
    packaged = _PACKAGE / "_resources" / name
    if packaged.is_dir():
        return packaged
    checkout = _PACKAGE.parent
    # In site-packages a sibling called `schemas` would be somebody else's package; only a checkout has this file.
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise RunError(
        f"{name}/ is missing from this installation of capfilt in {_PACKAGE}; install capfilt again"
    )


def _suggestion(name: str) -> str:
    known = list_recipes()
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean the recipe {close[0]!r}?"
    return f"give a path to a YAML file, or one of: {', '.join(known)}"
