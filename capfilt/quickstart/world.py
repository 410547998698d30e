"""The generated world: scenes as data, and the pictures drawn from them.

No words here (language.py) and no judging of words (truth.py): a scene is what a picture shows, with
certainty, because the picture was drawn from it. Pictures vary in everything a caption never states (exact
place, tilt, shade, light, grain), so that a model has to read the stated parts and cannot remember pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "gray", "striped", "grassy")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# The greatest half extent of an object, as a share of the canvas: at 48 px a small object spans 15 to 16 px and a large
# one 21 to 23 px, so that the two sizes never meet, and two large ones fit beside each other.
HALF_EXTENT = {"small": 0.165, "large": 0.235}
# Objects stand near the middle of a quarter of the canvas. Anywhere at all would be no harder for people, but a small
# transformer needs several times the steps to learn shapes it meets at every offset from its patches.
QUARTERS = (0.25, 0.75)
_STRAY = 0.015
_SHRINK = (0.93, 1.0)
_TILT_DEGREES = 10.0
_SUPERSAMPLING = 3
# A disc as wide as the square covers nearly the same pixels; a little smaller, it leaves the square's corners alone.
_ROUND = {"circle": 0.9, "ring": 1.0}

_RGB = {
    "red": (218, 22, 30),
    "orange": (252, 132, 8),
    "yellow": (250, 226, 28),
    "green": (14, 168, 52),
    "blue": (24, 74, 226),
}


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, and its centre (x to the right, y downwards, both as shares of the canvas in [0, 1])."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One or two objects, different in colour or shape, on a background.

    Two objects stand clearly apart along one axis, so that exactly one of the four relations holds.
    """

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def relation(self) -> str | None:
        """Where the first object is, seen from the second: "left", "right", "above" or "below"; None for one object."""
        if len(self.objects) == 1:
            return None
        first, second = self.objects
        dx, dy = first.x - second.x, first.y - second.y
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "above" if dy < 0 else "below"

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Scene:
        """A scene with uniform, independent attributes, and one object or two.

        Uniform on purpose: changing one attribute to any other value then leaves the distribution of scenes
        as it was, and so a wrong text cannot be told from a true one by its words alone (web.py).
        """
        background = _pick(rng, BACKGROUNDS)
        row, column = (int(k) for k in rng.integers(2, size=2))
        kinds = len(SHAPES) * len(COLOURS)
        kind = int(rng.integers(kinds))
        objects = [_somewhere(rng, kind, row, column)]
        if rng.random() < 0.5:
            other = (kind + int(rng.integers(1, kinds))) % kinds
            beside = rng.random() < 0.5
            objects.append(
                _somewhere(rng, other, row if beside else 1 - row, 1 - column if beside else column)
            )
        return cls(tuple(objects), background)

    def to_json(self) -> str:
        """The scene as a line of JSON; `from_json` reads it back equal. The relation is in it for human readers."""
        return json.dumps({**dataclasses.asdict(self), "relation": self.relation})

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """The scene that `to_json` wrote."""
        data = json.loads(text)
        return cls(tuple(SceneObject(**o) for o in data["objects"]), data["background"])


def render(scene: Scene, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """An RGB picture of the scene, `size` x `size` px; all variety comes from `rng`: equal states, equal pictures."""
    image = Image.fromarray(_background(scene.background, rng, size))
    for thing in scene.objects:
        _draw(image, thing, rng, size)
    light = np.float32(rng.uniform(0.94, 1.04))
    grain = rng.standard_normal((size, size, 3), dtype=np.float32)
    grain *= np.float32(rng.uniform(1.5, 5.0))
    grain += np.asarray(image) * light
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _somewhere(rng: np.random.Generator, kind: int, row: int, column: int) -> SceneObject:
    """An object of either size in one quarter of the canvas; `kind` counts through colours and shapes."""
    size = _pick(rng, SIZES)
    half = HALF_EXTENT[size]
    x, y = np.clip(
        np.array((QUARTERS[column], QUARTERS[row])) + rng.uniform(-_STRAY, _STRAY, 2), half, 1 - half
    )
    colour, shape = COLOURS[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)]
    return SceneObject(shape, colour, size, round(float(x), 4), round(float(y), 4))


def _background(name: str, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]; every background is neutral or dull, so that no object colour drowns in it."""
    y, x = _grid(size)
    shift = rng.uniform(-6, 6)
    if name in ("white", "black"):
        tone = (242.0 if name == "white" else 16.0) + shift + rng.uniform(-3, 3, 3)
        flat = np.broadcast_to(tone, (size, size, 3))
    elif name == "gray":
        angle = rng.uniform(0, 2 * math.pi)
        ramp = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
        flat = np.repeat((128 + shift + rng.uniform(20, 45) * ramp)[..., None], 3, axis=2)
    elif name == "striped":
        angle = rng.uniform(0, math.pi)
        wave = np.sin(
            2 * math.pi * (rng.uniform(4.5, 6.5) * (x * math.cos(angle) + y * math.sin(angle)) + rng.random())
        )
        stripes = np.clip(wave * 4, -1, 1)
        flat = np.repeat((168 + shift + rng.uniform(32, 44) * stripes)[..., None], 3, axis=2)
    else:
        horizon = rng.uniform(0.35, 0.65) + 0.02 * np.sin(
            2 * math.pi * (rng.uniform(1, 3) * x + rng.random())
        )
        sky = np.array((196, 222, 240)) + shift + 30 * (y - 0.5)[..., None]
        blades = 10 * np.sin(x * size * 1.9 + 7 * np.sin(y * size * 0.7))
        grass = np.array((112, 128, 62)) - shift + blades[..., None]
        above = np.clip((horizon - y) * size + 0.5, 0, 1)[..., None]
        flat = sky * above + grass * (1 - above)
    result: NDArray[np.uint8] = np.clip(flat, 0, 255).astype(np.uint8)
    return result


@functools.cache
def _grid(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixel centres as shares of the canvas: y and x, both [size, size]."""
    line = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(line, line, indexing="ij")
    return y, x


def _draw(image: Image.Image, thing: SceneObject, rng: np.random.Generator, size: int) -> None:
    """Paint one object: its body in its colour, then a thin darker rim that keeps yellow visible on white."""
    shrink = rng.uniform(*_SHRINK)
    radius = HALF_EXTENT[thing.size] * shrink * size
    room = HALF_EXTENT[thing.size] * (1 - shrink) * size
    centre_x = thing.x * size + rng.uniform(-room, room)
    centre_y = thing.y * size + rng.uniform(-room, room)
    tilt = math.radians(rng.uniform(-_TILT_DEGREES, _TILT_DEGREES))
    shade = np.array(_RGB[thing.colour]) * rng.uniform(0.92, 1.04) + rng.uniform(-10, 10, 3)
    body = _rgb(shade)
    rim = _rgb(shade * 0.66)

    left, top = math.floor(centre_x - radius) - 1, math.floor(centre_y - radius) - 1
    span = math.ceil(2 * radius) + 4
    patch = (span * _SUPERSAMPLING, span * _SUPERSAMPLING)
    x, y = (centre_x - left) * _SUPERSAMPLING, (centre_y - top) * _SUPERSAMPLING
    r = radius * _SUPERSAMPLING
    line = max(2, round(0.075 * r))
    filled, edge = Image.new("L", patch), Image.new("L", patch)
    pen, rim_pen = ImageDraw.Draw(filled), ImageDraw.Draw(edge)
    if thing.shape in ("circle", "ring"):
        r *= _ROUND[thing.shape]
        outer = (x - r, y - r, x + r, y + r)
        rim_pen.ellipse(outer, outline=255, width=line)
        if thing.shape == "circle":
            pen.ellipse(outer, fill=255)
        else:
            band = round(0.40 * r)
            pen.ellipse(outer, outline=255, width=band)
            hole = r - band
            rim_pen.ellipse((x - hole, y - hole, x + hole, y + hole), outline=255, width=max(1, line // 2))
    else:
        cos, sin = math.cos(tilt), math.sin(tilt)
        corners = [
            (x + r * (px * cos - py * sin), y + r * (px * sin + py * cos))
            for px, py in _OUTLINES[thing.shape]
        ]
        pen.polygon(corners, fill=255)
        # The rim is drawn half outside an outline and then cut back to the body: corners stay as sharp as the
        # body's.
        rim_pen.line([*corners, corners[0], corners[1]], fill=255, width=2 * line, joint="curve")
        edge = Image.composite(edge, Image.new("L", patch), filled)
    image.paste(body, (left, top), filled.reduce(_SUPERSAMPLING))
    image.paste(rim, (left, top), edge.reduce(_SUPERSAMPLING))


def _rgb(shade: NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in np.clip(shade, 0, 255))
    return red, green, blue


def _star() -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        length = 1.0 if k % 2 == 0 else 0.38
        angle = math.pi * k / 5 - math.pi / 2
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return points


# Corners for an object of half extent 1. Tilted, none leaves it by more than a few per cent.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.98), (1.0, 0.84), (-1.0, 0.84)],
    "star": _star(),
}  # fmt: skip
