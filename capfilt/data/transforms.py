"""Pictures to model input: the square uint8 array, normalisation, and random views of pictures.

Not here: decoding bytes (`images.py`), or which pictures make a batch (`pairs.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from capfilt.data.images import MAX_PIXELS, decode

FILL = (128, 128, 128)  # BLIP, official code: what RandAugment shifts in from outside the picture


def to_uint8(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """The picture as uint8 [3, size, size]: bicubic, antialiased, aspect not kept, no crop (BLIP's evaluation).

    Exactly Pillow's `resize((size, size), BICUBIC)` of the picture as RGB, which the released code sees too.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def quick_uint8(picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """As `to_uint8` of uint8 [H, W, 3], for training: torch computes the same filter in 16 bits, in about a fifth of the time.

    Some values in a thousand differ from Pillow's, smooth ones by 1 or 2 of 255, sharp edges by more.
    """
    if picture.shape[:2] != (size, size):
        # Seen as a batch of one with its channels last, which is how the picture lies and what the fast path is for.
        rows = np.require(picture, requirements=("C", "W"))
        pixels = torch.from_numpy(rows).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        picture = resized[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(picture.transpose(2, 0, 1))


def decode_uint8(
    data: bytes, size: int, *, max_pixels: int = MAX_PIXELS, draft: bool = False
) -> npt.NDArray[np.uint8]:
    """Encoded bytes as uint8 [3, size, size]: `decode`, then `to_uint8`. Raises BadImage.

    draft: whether the decoder first scales large JPEGs by 1/2, 1/4 or 1/8, both sides left at twice `size` or more. Faster,
    and not the same pixels.
    """
    return to_uint8(decode(data, max_pixels=max_pixels, draft_size=2 * size if draft else None), size)


def training_picture(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Encoded bytes as the whole picture, uint8 [H, W, 3], for training at `size` pixels. Raises BadImage.

    Large JPEGs are scaled by their decoder, to no less than twice that size.
    """
    image = decode(data, max_pixels=max_pixels, draft_size=2 * size)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def training_uint8(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """As `decode_uint8`, for training: `training_picture`, then `quick_uint8`. Raises BadImage."""
    return quick_uint8(training_picture(data, size, max_pixels=max_pixels), size)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] to (x / 255 - mean) / std, in the dtype of `mean` and `std` [3, 1, 1], on the same device.

    In place after the conversion: at the size of a batch, every further tensor would be fresh memory to be faulted in.
    """
    return pixels.to(mean.dtype, copy=True).sub_(mean * 255).mul_(1 / (std * 255))


# ---------------------------------------------------------------------- random views


@dataclass(frozen=True)
class Views:
    """Random views of pictures, each text's its own: a resized crop, a flip, then RandAugment, in the order of BLIP's code.

    Attributes:
        scale: share of the picture's area a crop keeps, drawn uniformly. BLIP pretrains with 0.2 to 1.0 and finetunes
            with 0.5 to 1.0 (official code).
        ratio: aspect ratio of the crop, drawn log-uniformly (torchvision's RandomResizedCrop default, which BLIP uses).
        flip: chance of a left-right flip. 0 by default, though BLIP uses 0.5: a flip makes "on the left" false.
        operations, level: `rand_augment`'s n and m.
        seed: of the run; with step and place in the batch it decides everything, so that ranks change nothing.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    operations: int = 0
    level: float = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} is not 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip} is not within [0, 1]")

    def view(
        self, picture: npt.NDArray[np.uint8], size: int, step: int, place: int, keep_sides: bool
    ) -> npt.NDArray[np.uint8]:
        """uint8 [3, size, size] of uint8 [H, W, 3], for the picture at `place` of batch `step`; `keep_sides`: never flipped."""
        rng = np.random.default_rng([self.seed, step, place])
        left, top, width, height = self.box(picture.shape[1], picture.shape[0], rng)
        pixels = quick_uint8(picture[top : top + height, left : left + width], size)
        if rng.random() < self.flip and not keep_sides:
            pixels = pixels[:, :, ::-1]
        if self.operations:
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            image = rand_augment(image, rng, self.operations, self.level)
            pixels = np.asarray(image).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels)

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, width, height) of a crop, by torchvision's RandomResizedCrop, which BLIP and ALBEF use: ten draws of
        area and ratio, else the largest middle of an allowed ratio. All of the picture, whatever its ratio, where `scale`
        allows no less.
        """
        low, high = self.ratio
        if self.scale[0] == 1:
            return 0, 0, width, height
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                return int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1)), wide, tall
        wide, tall = min(width, round(height * high)), min(height, round(width / low))
        wide, tall = max(1, wide), max(1, tall)
        return (width - wide) // 2, (height - tall) // 2, wide, tall


# ---------------------------------------------------------------------- left and right in texts

_SIDES = re.compile(r"\b(left|right)(?=(?:most|wards?)?\b)", re.IGNORECASE)


def mentions_sides(text: str) -> bool:
    """Whether the text names left or right, so that flipping its picture would make it false."""
    return _SIDES.search(text) is not None


def swap_left_right(text: str) -> str:
    """The text of a flipped picture: left and right (leftmost, rightwards, ...) exchanged, capitals kept."""
    return _SIDES.sub(_other_side, text)


def _other_side(match: re.Match[str]) -> str:
    word = match[0]
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


# ---------------------------------------------------------------------- RandAugment, one picture at a time

_MAX_LEVEL = 10  # BLIP, official code: levels run from 0 to 10


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() > 0.5 else value


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, inverse, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _shear_x(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, -_signed(0.3 * m / _MAX_LEVEL, rng), 0, 0, 1, 0)


def _shear_y(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, 0, -_signed(0.3 * m / _MAX_LEVEL, rng), 1, 0)


def _translate_x(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, _signed(10 * m / _MAX_LEVEL, rng), 0, 1, 0)


def _translate_y(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _signed(10 * m / _MAX_LEVEL, rng))


def _rotate(image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    angle = _signed(30 * m / _MAX_LEVEL, rng)
    return image.rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=FILL)


def _enhance_level(m: float) -> float:
    return 1.8 * m / _MAX_LEVEL + 0.1


# BLIP's ten operations with BLIP's level maps (official code).
_OPERATIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "Identity": lambda image, *_: image,
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Brightness": lambda image, m, _: ImageEnhance.Brightness(image).enhance(_enhance_level(m)),
    "Sharpness": lambda image, m, _: ImageEnhance.Sharpness(image).enhance(_enhance_level(m)),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}
OPERATIONS = tuple(_OPERATIONS)


def rand_augment(image: Image.Image, rng: np.random.Generator, n: int = 2, m: float = 5) -> Image.Image:
    """`n` operations drawn with replacement, each applied with chance 0.5 at level `m` of 10 (BLIP: n=2, m=5).

    At m=5 the enhancement factor is exactly 1, so Brightness and Sharpness do nothing, as in BLIP's official code.
    Returns an RGB picture of the same size.
    """
    image = image.convert("RGB")
    for name in rng.choice(OPERATIONS, size=n):
        if rng.random() <= 0.5:
            image = apply_operation(image, str(name), m, rng)
    return image


def apply_operation(image: Image.Image, name: str, m: float, rng: np.random.Generator) -> Image.Image:
    """One of `OPERATIONS` at level `m` (0 to 10); `rng` draws the sign of shears, shifts and turns."""
    return _OPERATIONS[name](image, m, rng)
