"""Templates of pages, in which text can never become markup: everything is made visible and escaped.

The templates lie beside this file. Their line ends and indentation are layout of theirs alone, no part of the page.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.ext import Extension
from markupsafe import Markup

from capfilt.catalog.artefacts import number
from capfilt.tables.visible import visible

FOLDER = Path(__file__).parent


class _Layout(Extension):
    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        return re.sub(r"\s*\n\s*", "", source)


def _shown(value: Any) -> Any:
    """Every value on its way into a page: Jinja escapes it after this, unless it is markup of a template's own."""
    return value if isinstance(value, Markup) else visible(str(value))


@cache
def template(name: str) -> Template:
    """A template of this folder. A name that it is not given is an error, not nothing."""
    pages = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        extensions=[_Layout],
    )
    pages.filters |= {"number": number, "thousands": "{:,}".format, "digits": "{:g}".format}
    return pages.get_template(name)
