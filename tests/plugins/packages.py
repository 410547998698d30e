"""Installs small packages into a directory as pip would, metadata and all, so that entry points are the real thing."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/plugins.md in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


def install(site: Path, name: str, module: str, entries: dict[str, dict[str, str]]) -> Path:
    """Writes `name`.py and its dist-info; `entries` is {group: {plug-in: value}}. Returns `site`."""
    information = site / f"{name}-1.0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (site / f"{name}.py").write_text(module)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, names in entries.items():
        lines += [f"[{group}]", *(f"{plugin} = {value}" for plugin, value in names.items())]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


def install_documented(site: Path) -> Path:
    """The package of docs/plugins.md, word for word."""
    (module,), (project,) = blocks("python"), blocks("toml")
    return install(site, "my_pkg", module, tomllib.loads(project)["project"]["entry-points"])


def use(monkeypatch, site: Path, *modules: str) -> None:
    """Puts `site` in front of the path, for this test alone."""
    monkeypatch.syspath_prepend(str(site))
    for name in ("my_pkg", *modules):
        monkeypatch.delitem(sys.modules, name, raising=False)
