"""SugarCrepe's files (github.com/RAIVNLab/sugar-crepe): records by their numbers, a caption and a wrong one each."""

from __future__ import annotations

from capfilt.formats.examples.row import Examples, example
from capfilt.formats.source import Given


def detect(given: Given) -> bool:
    """Whether the first entry of an object has a wrong caption."""
    first = next(iter(given.object.values()), None)
    return isinstance(first, dict) and "negative_caption" in first


def read(given: Given) -> Examples:
    """A choice per record; the file's name is the category of all of them."""
    name = given.path.name.partition(".")[0]
    rows = []
    for number, record in given.object.items():
        fields = record if isinstance(record, dict) else {}
        image = fields.get("filename")
        known = {
            "id": f"{name}:{number}",
            "images": [image] if isinstance(image, str) else [],
            "category": name,
            **{text: fields.get(text) for text in ("caption", "negative_caption")},
        }
        rows.append(example(known, 0))
    return "choice", rows
