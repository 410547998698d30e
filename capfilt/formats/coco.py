"""COCO's captions: a JSON object of `images` and `annotations`. Each image may have a `split`."""

from __future__ import annotations

from dataclasses import replace

from capfilt.errors import UserError
from capfilt.formats import Reading, karpathy
from capfilt.formats.source import Found, Given, ListedSource, SourceRow, described, pictures_of, placed
from capfilt.formats.values import identity, text_of


def detect(given: Given) -> bool:
    """Whether it is such an object, be its annotations captions or not."""
    lists = all(isinstance(given.object.get(name), list) for name in ("images", "annotations"))
    return lists and not karpathy.detect(given)


def read(given: Given, reading: Reading) -> ListedSource:
    """A row per image, its texts in the order of the annotations; captions of an image that is not listed are a row too.

    Ids are compared as text, so that 7 finds "7". Raises UserError when the file is not captions.
    """
    path, data = given.path, given.object
    if not detect(given):
        raise UserError(
            f"{path}: is not COCO captions JSON (an object of `images` and `annotations`); leave out --format"
        )
    root = pictures_of(path, reading)
    images = [image if isinstance(image, dict) else {} for image in data["images"]]
    ids = [image.get("id") for image in images]
    # "7" and "007" are one, unless the file has both.
    spelled = identity if len({*map(identity, ids)}) == len({*map(text_of, ids)}) else text_of
    texts: dict[str, list[str]] = {}
    for annotation in data["annotations"]:
        if isinstance(annotation, dict) and annotation.get("caption") is not None:
            texts.setdefault(spelled(annotation.get("image_id")), []).append(text_of(annotation["caption"]))
    if data["annotations"] and not texts and reading.caption_col != ("",):
        raise UserError(
            f"{path}: its annotations have no `caption`; give the captions file, not instances or keypoints, or "
            "--caption-col '' for pictures without texts"
        )
    licenses = {
        identity(entry.get("id")): text_of(entry.get("name") or entry.get("url"))
        for entry in data.get("licenses") or []
        if isinstance(entry, dict)
    }
    rows = []
    for number, entry in enumerate(images):
        row = placed(
            described(f"#{number}", entry, extra=reading.save_additional_columns),
            entry.get("file_name"),
            root,
        )
        license_ = licenses.get(identity(entry.get("license")), row.license)
        rows.append(replace(row, captions=tuple(texts.get(spelled(ids[number]), ())), license=license_))
    listed = set(map(spelled, ids))
    for image, captions in texts.items():
        if image not in listed:
            words = f"captions are of image {image}, which the file does not list"
            rows.append(SourceRow(f"#{image}", tuple(captions)).missing(words))
    return ListedSource(path, reading, Found(rows))
