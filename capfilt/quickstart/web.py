"""The generated web: pages with a picture, an alt text and their troubles; and the clean human set beside it.

What is planted where, with what share, and the files that a run reads (URL list, COCO captions) and that only
grading reads (truth.parquet). Serving the pages is server.py's. Every page draws from random streams of its own,
keyed by (seed, page number), and so stays what it was when more pages are asked for.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from capfilt.quickstart import spam
from capfilt.quickstart.language import captions, one_attribute_off, state, write
from capfilt.quickstart.truth import KINDS, is_true
from capfilt.quickstart.world import Scene, render
from capfilt.tables.publish import replace

# The share of each kind of text but "true", which is the rest, a little over half. Texts and troubles are drawn
# independently.
KIND_SHARES = {
    "other_image": 0.24,
    "one_attribute_off": 0.12,
    "file_name": 0.03,
    "boilerplate": 0.03,
    "truncated": 0.03,
    "other_language": 0.03,
}
# The share of each trouble but "none", which is the rest. Pages that give no bytes fail to download; bytes that give no
# picture, or one below --min-image-size, fail to resize.
TROUBLE_SHARES = {
    "redirect": 0.02,  # 301 or 302 to the live picture, which arrives
    "dead_link": 0.012,  # 404
    "server_error": 0.006,  # 500
    "slow": 0.003,  # a body that stalls and never ends: the reader's deadline passes
    "cut_short": 0.01,  # a JPEG cut off at 30 to 80% of its bytes, and said to be that long
    "corrupt": 0.01,  # a JPEG's first bytes, then noise
    "wrong_type": 0.01,  # an HTML page served as image/jpeg
    "tiny": 0.009,  # a picture of at most TINY_PIXELS a side
}
TINY_PIXELS = 16
_DUPLICATES = 0.03


@dataclass(frozen=True)
class WebPage:
    """One row of the generated web.

    `kind` is the text's (truth.KINDS), `changed` the fact changed where the kind is one_attribute_off,
    `trouble` "none" or one of TROUBLE_SHARES. `picture` is the number of the page whose picture this one shows: its own, or
    for a duplicate an earlier one's.
    """

    seed: int
    number: int
    path: str
    text: str
    kind: str
    changed: str | None
    scene: Scene
    trouble: str
    picture: int
    format: str

    @property
    def scene_id(self) -> str:
        """The page's name in URL lists and in truth.parquet."""
        return f"{self.number:07d}"


_SCENE, _TEXT, _TROUBLE, _PICTURE, _BYTES, _HUMAN, _HUMAN_PICTURE = range(7)
_NEIGHBOURS = 256
_FOLDERS = ("img", "photos", "shop/items", "blog/uploads", "gallery")
# Most of the web's pictures are JPEG, the rest WebP; the others keep the decoders honest.
_FORMAT_SHARES = {"jpeg": 0.87, "png": 0.08}
_ENDINGS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def build_web(seed: int, images: int) -> list[WebPage]:
    """The first `images` pages of the web of this seed.

    Text of a wrong page: a caption of another page's picture that is false here, or a true caption with one
    attribute changed. Both have the words of true captions in the same proportions. Duplicates show an
    earlier page's picture under their own address and text.
    """
    pages: list[WebPage] = []
    for number in range(images):
        rng = _stream(seed, _TROUBLE, number)
        trouble = _draw(TROUBLE_SHARES, rng, "none")
        earlier = int(rng.integers(max(number, 1)))
        duplicate = rng.random() < _DUPLICATES and number > 0 and trouble in ("none", "redirect")
        folder = _FOLDERS[int(rng.integers(len(_FOLDERS)))]
        image_format = _draw(_FORMAT_SHARES, rng, "webp")
        if trouble in ("cut_short", "corrupt", "wrong_type"):
            image_format = "jpeg"
        picture, scene = number, _scene(seed, number)
        if duplicate:
            source = pages[earlier]
            picture, scene, image_format = source.picture, source.scene, source.format
        text, kind, changed = _text(seed, number, scene)
        path = f"/{folder}/{number:07d}.{_ENDINGS[image_format]}"
        pages.append(WebPage(seed, number, path, text, kind, changed, scene, trouble, picture, image_format))
    return pages


def picture_bytes(page: WebPage) -> tuple[bytes, str]:
    """The page's picture as sent when nothing is wrong, and its content type. The same bytes every time."""
    rng = _stream(page.seed, _PICTURE, page.picture)
    size = int(rng.integers(80, 129))
    return _encode(render(page.scene, rng, size), page.format, int(rng.integers(80, 96)))


def troubled_bytes(page: WebPage) -> tuple[bytes, str]:
    """What the server sends with status 200: the picture, or what its trouble made of it; and the content type."""
    rng = _stream(page.seed, _BYTES, page.number)
    if page.trouble == "wrong_type":
        body = f"<!DOCTYPE html><html><body><h1>Please sign in</h1><p>{page.scene_id}</p></body></html>"
        return body.encode(), "image/jpeg"
    if page.trouble == "tiny":
        return _encode(render(page.scene, rng, int(rng.integers(6, TINY_PIXELS + 1))), page.format, 90)
    data, content_type = picture_bytes(page)
    if page.trouble == "cut_short":
        return data[: int(len(data) * rng.uniform(0.3, 0.8))], content_type
    if page.trouble == "corrupt":
        return data[:4] + rng.integers(0, 255, len(data) - 4, dtype=np.uint8).tobytes(), content_type
    return data, content_type


def write_web(directory: Path, pages: Sequence[WebPage], base_url: str) -> None:
    """Write `truth.parquet` and `urls.parquet`, a row per page.

    A download starts from the list urls.parquet: `url`, `caption`, `scene_id`, nothing of truth. It is written last: where
    it exists, both files are whole. Only grading reads truth.parquet, never a stage. Its columns: `url`, `scene_id`,
    `kind`, `changed` (null but for one_attribute_off), `well_formed`, `true` (of the text, from its kind), `scene` (JSON,
    `Scene.from_json`), `trouble`, `picture` (scene_id of the page whose picture this page shows).
    """
    urls = [base_url.rstrip("/") + page.path for page in pages]
    names = [page.scene_id for page in pages]
    truth = {
        "url": urls,
        "scene_id": names,
        "kind": [page.kind for page in pages],
        "changed": pa.array([page.changed for page in pages], pa.string()),
        "well_formed": [KINDS[page.kind].well_formed for page in pages],
        "true": [KINDS[page.kind].true for page in pages],
        "scene": [page.scene.to_json() for page in pages],
        "trouble": [page.trouble for page in pages],
        "picture": [f"{page.picture:07d}" for page in pages],
    }
    listed = {"url": urls, "caption": [page.text for page in pages], "scene_id": names}
    for name, columns in (("truth", truth), ("urls", listed)):
        file = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), file)
        replace(directory / f"{name}.parquet", file.getvalue().to_pybytes())


@dataclass(frozen=True)
class HumanImage:
    """One picture of the clean set with its captions, all true and naming every object with colour and shape."""

    seed: int
    id: int
    file_name: str
    split: str
    scene: Scene
    captions: tuple[str, ...]


# The id of each split's first image.
_FIRST = {"train": 0, "test": 2_000_000}


def build_human(seed: int, images: Mapping[str, int], captions_per_image: int = 5) -> list[HumanImage]:
    """The clean set: so many images per split ("train", "test"), each with different careful captions.

    An image is the same whatever the other counts are.
    """
    rows = []
    for split, count in images.items():
        for number in range(count):
            identity = _FIRST[split] + number
            rng = _stream(seed, _HUMAN, identity)
            scene = Scene.sample(rng)
            texts = captions(scene, captions_per_image, rng)
            rows.append(HumanImage(seed, identity, f"{split}_{number:06d}.jpg", split, scene, texts))
    return rows


def write_human(directory: Path, rows: Iterable[HumanImage]) -> Path:
    """Write `captions.json` (COCO captions: images with `split`, annotations) and the pictures it names in `images/`.

    Returns the path of captions.json, which is written last: where it exists, the set is whole.
    """
    folder = directory / "images"
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for row in rows:
        rng = _stream(row.seed, _HUMAN_PICTURE, row.id)
        size = int(rng.integers(80, 129))
        data, _ = _encode(render(row.scene, rng, size), "jpeg", 92)
        (folder / row.file_name).write_bytes(data)
        images.append(
            {"id": row.id, "file_name": row.file_name, "split": row.split, "width": size, "height": size}
        )
        for text in row.captions:
            annotations.append({"id": len(annotations), "image_id": row.id, "caption": text})
    path = directory / "captions.json"
    replace(path, json.dumps({"images": images, "annotations": annotations}, indent=1).encode())
    return path


def _stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, number))


def _scene(seed: int, number: int) -> Scene:
    return Scene.sample(_stream(seed, _SCENE, number))


def _draw(shares: Mapping[str, float], rng: np.random.Generator, rest: str) -> str:
    roll = rng.random()
    for name, share in shares.items():
        if roll < share:
            return name
        roll -= share
    return rest


def _text(seed: int, number: int, scene: Scene) -> tuple[str, str, str | None]:
    """A page's alt text, its kind, and the fact changed."""
    rng = _stream(seed, _TEXT, number)
    kind = _draw(KIND_SHARES, rng, "true")
    changed = None
    if kind == "file_name":
        return spam.file_name(rng), kind, None
    if kind == "boilerplate":
        return spam.boilerplate(rng), kind, None
    if kind == "other_image":
        statement = None
        while statement is None or is_true(statement, scene):
            # A neighbour's, not any page's: a page must not depend on how many pages there are.
            other = number - number % _NEIGHBOURS + int(rng.integers(_NEIGHBOURS))
            statement = state(_scene(seed, other), rng)
    else:
        statement = state(scene, rng)
    if kind == "one_attribute_off":
        statement, changed = one_attribute_off(statement, rng)
    writer = {"truncated": spam.truncated, "other_language": spam.other_language}.get(kind, write)
    return writer(statement, rng), kind, changed


def _encode(image: Image.Image, image_format: str, quality: int) -> tuple[bytes, str]:
    options = {
        "jpeg": {"quality": quality},
        "png": {"compress_level": 1},
        "webp": {"quality": quality, "method": 0},
    }
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options[image_format])
    return buffer.getvalue(), f"image/{image_format}"
