"""An example file written by a test, and its rows."""

from __future__ import annotations

import json

from capfilt.formats.examples.row import example_rows


def read(tmp_path, content, name="source.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return example_rows(path)


def lines(records):
    return "\n".join(map(json.dumps, records)) + "\n"
