"""The generated web: pages with a picture, an alt text and their troubles; and the clean human set beside it.

What is planted where, with what share, and the files that a run reads (URL list, COCO captions) and that only
grading reads (truth.parquet). Serving the pages is server.py's. Every page draws from random streams of its own,
keyed by (seed, page number), and so stays what it was when more pages are asked for.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from capfilt.quickstart import spam
from capfilt.quickstart.language import HUMAN, WEB, captions, one_attribute_off, state, write
from capfilt.quickstart.truth import KINDS, is_true
from capfilt.quickstart.world import Scene, render


@dataclass(frozen=True)
class Trouble:
    """What the server does to one page: whether a picture can still be had, and img2dataset's status for the row."""

    arrives: bool
    status: str
    doc: str


# The statuses were observed with img2dataset 1.47: pages that give no bytes fail to download, bytes that give
# no picture (or one below --min_image_size) fail to resize.
TROUBLES: dict[str, Trouble] = {
    "none": Trouble(True, "success", "the picture is served"),
    "redirect": Trouble(True, "success", "301 or 302 to the live picture"),
    "dead_link": Trouble(False, "failed_to_download", "404"),
    "server_error": Trouble(False, "failed_to_download", "500"),
    "slow": Trouble(
        False, "failed_to_download", "a body that stalls and never ends: the reader's deadline passes"
    ),
    "cut_short": Trouble(
        False, "failed_to_resize", "a JPEG cut off at 30 to 80% of its bytes, and said to be that long"
    ),
    "corrupt": Trouble(False, "failed_to_resize", "a JPEG's first bytes, then noise"),
    "wrong_type": Trouble(False, "failed_to_resize", "an HTML page served as image/jpeg"),
    "tiny": Trouble(
        False, "failed_to_resize", "a picture of at most TINY_PIXELS px a side: below the least size"
    ),
}
TINY_PIXELS = 16


@dataclass(frozen=True)
class Shares:
    """How much of the web is what. Texts and troubles are drawn independently; the rest is true and untroubled.

    The defaults leave a little over half of the texts true. `wrong` counts well-formed false texts only, and
    may be at most 0.5.
    """

    wrong: float = 0.36
    one_attribute_of_wrong: float = 1 / 3
    file_name: float = 0.03
    boilerplate: float = 0.03
    truncated: float = 0.03
    other_language: float = 0.03
    dead_link: float = 0.012
    server_error: float = 0.006
    slow: float = 0.003
    cut_short: float = 0.01
    corrupt: float = 0.01
    wrong_type: float = 0.01
    tiny: float = 0.009
    redirect: float = 0.02
    duplicate: float = 0.03

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share in [0, 1], not {value}")
        if self.wrong > 0.5:
            raise ValueError(f"at most half of the web's texts may be wrong, not {self.wrong}")
        if sum(self.kinds().values()) > 1 + 1e-9 or sum(self.troubles().values()) > 1 + 1e-9:
            raise ValueError("shares of texts, and shares of troubles, add up to at most 1 each")

    def kinds(self) -> dict[str, float]:
        """The share of each kind of text but "true", which is the rest."""
        one_off = self.wrong * self.one_attribute_of_wrong
        return {
            "other_image": self.wrong - one_off,
            "one_attribute_off": one_off,
            "file_name": self.file_name,
            "boilerplate": self.boilerplate,
            "truncated": self.truncated,
            "other_language": self.other_language,
        }

    def troubles(self) -> dict[str, float]:
        """The share of each trouble but "none", which is the rest."""
        return {name: getattr(self, name) for name in TROUBLES if name != "none"}


@dataclass(frozen=True)
class WebPage:
    """One row of the generated web.

    `kind` is the text's (truth.KINDS), `changed` the fact changed where the kind is one_attribute_off,
    `trouble` one of TROUBLES. `picture` is the number of the page whose picture this one shows: its own, or
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

    def url(self, base_url: str) -> str:
        """The page's address under the server's, for example http://127.0.0.1:20000/img/0000003.jpg."""
        return base_url.rstrip("/") + self.path


_SCENE, _TEXT, _TROUBLE, _PICTURE, _BYTES, _HUMAN, _HUMAN_PICTURE = range(7)
_NEIGHBOURS = 256
_FOLDERS = ("img", "photos", "shop/items", "blog/uploads", "gallery")
# Most of the web's pictures are JPEG; the others keep the decoders honest.
_FORMATS = (("jpeg", "jpg", 0.87), ("png", "png", 0.08), ("webp", "webp", 0.05))


def build_web(seed: int, images: int, shares: Shares | None = None) -> list[WebPage]:
    """The first `images` pages of the web of this seed.

    Text of a wrong page: a caption of another page's picture that is false here, or a true caption with one
    attribute changed. Both have the words of true captions in the same proportions. Duplicates show an
    earlier page's picture under their own address and text.
    """
    shares = shares or Shares()
    pages: list[WebPage] = []
    for number in range(images):
        rng = _stream(seed, _TROUBLE, number)
        trouble = _draw(shares.troubles(), rng, "none")
        fresh = int(rng.integers(max(number, 1)))
        duplicate = rng.random() < shares.duplicate and number > 0 and trouble in ("none", "redirect")
        folder = _FOLDERS[int(rng.integers(len(_FOLDERS)))]
        roll, kind_of_file = rng.random(), 0
        while kind_of_file < len(_FORMATS) - 1 and roll >= _FORMATS[kind_of_file][2]:
            roll -= _FORMATS[kind_of_file][2]
            kind_of_file += 1
        image_format, ending, _ = _FORMATS[kind_of_file]
        if trouble in ("cut_short", "corrupt", "wrong_type"):
            image_format, ending, _ = _FORMATS[0]
        picture, scene = number, _scene(seed, number)
        if duplicate:
            source = pages[fresh]
            picture, scene, image_format = source.picture, source.scene, source.format
            ending = next(e for f, e, _ in _FORMATS if f == image_format)
        text, kind, changed = _text(seed, number, scene, shares)
        path = f"/{folder}/{number:07d}.{ending}"
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


def write_url_list(path: Path, pages: Sequence[WebPage], base_url: str) -> None:
    """The list a download starts from: Parquet with `url`, `caption`, `scene_id`; a row per page, nothing of truth."""
    table = pa.table(
        {
            "url": pa.array([page.url(base_url) for page in pages], pa.string()),
            "caption": pa.array([page.text for page in pages], pa.string()),
            "scene_id": pa.array([page.scene_id for page in pages], pa.string()),
        }
    )
    _write_parquet(path, table)


def write_truth(path: Path, pages: Sequence[WebPage], base_url: str) -> None:
    """The grading file, kept apart from everything a stage reads. One row per page of the URL list, in its order.

    Columns: `url`, `scene_id`, `kind`, `changed` (null but for one_attribute_off), `well_formed`, `true` (of
    the text, from its kind), `scene` (JSON, `Scene.from_json`), `trouble`, `picture` (scene_id of the page
    whose picture this one shows).
    """
    table = pa.table(
        {
            "url": pa.array([page.url(base_url) for page in pages], pa.string()),
            "scene_id": pa.array([page.scene_id for page in pages], pa.string()),
            "kind": pa.array([page.kind for page in pages], pa.string()),
            "changed": pa.array([page.changed for page in pages], pa.string()),
            "well_formed": pa.array([KINDS[page.kind].well_formed for page in pages], pa.bool_()),
            "true": pa.array([KINDS[page.kind].true for page in pages], pa.bool_()),
            "scene": pa.array([page.scene.to_json() for page in pages], pa.string()),
            "trouble": pa.array([page.trouble for page in pages], pa.string()),
            "picture": pa.array([f"{page.picture:07d}" for page in pages], pa.string()),
        }
    )
    _write_parquet(path, table)


@dataclass(frozen=True)
class HumanImage:
    """One picture of the clean set with its captions, all true and naming every object with colour and shape."""

    seed: int
    id: int
    file_name: str
    split: str
    scene: Scene
    captions: tuple[str, ...]


SPLITS = ("train", "val", "test")
_SPLIT_STRIDE = 1_000_000


def build_human(seed: int, images: Mapping[str, int], captions_per_image: int = 5) -> list[HumanImage]:
    """The clean set: so many images per split ("train", "val", "test"), each with different careful captions.

    An image is the same whatever the other counts are. Raises ValueError for another split's name.
    """
    for split, count in images.items():
        if split not in SPLITS or not 0 <= count < _SPLIT_STRIDE:
            raise ValueError(
                f"{count} images of split {split!r}: splits are {', '.join(SPLITS)}, below a million each"
            )
    rows = []
    for split_number, split in enumerate(SPLITS):
        for number in range(images.get(split, 0)):
            identity = split_number * _SPLIT_STRIDE + number
            rng = _stream(seed, _HUMAN, identity)
            scene = Scene.sample(rng)
            texts = captions(scene, captions_per_image, rng, HUMAN)
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
    waiting = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    waiting.write_text(json.dumps({"images": images, "annotations": annotations}, indent=1), encoding="utf-8")
    waiting.replace(path)
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


def _text(seed: int, number: int, scene: Scene, shares: Shares) -> tuple[str, str, str | None]:
    """A page's alt text, its kind, and the fact changed."""
    rng = _stream(seed, _TEXT, number)
    kind = _draw(shares.kinds(), rng, "true")
    if kind == "file_name":
        return spam.file_name(rng), kind, None
    if kind == "boilerplate":
        return spam.boilerplate(rng), kind, None
    if kind == "other_image":
        while True:
            # A neighbour's, not any page's: a page must not depend on how many pages there are.
            other = number - number % _NEIGHBOURS + int(rng.integers(_NEIGHBOURS))
            statement = state(_scene(seed, other), rng, WEB)
            if not is_true(statement, scene):
                return write(statement, rng), kind, None
    statement = state(scene, rng, WEB)
    if kind == "one_attribute_off":
        statement, changed = one_attribute_off(statement, rng)
        return write(statement, rng), kind, changed
    if kind == "truncated":
        return spam.truncated(statement, rng), kind, None
    if kind == "other_language":
        return spam.other_language(statement, rng), kind, None
    return write(statement, rng), kind, None


def _encode(image: Image.Image, image_format: str, quality: int) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=1)
    elif image_format == "webp":
        image.save(buffer, "WEBP", quality=quality, method=0)
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), f"image/{image_format}"


def _write_parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, waiting)
    waiting.replace(path)
