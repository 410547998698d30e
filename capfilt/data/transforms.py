"""Pictures to model input: the square uint8 array, normalisation, and augmentation of batches and of single pictures.

Not here: decoding bytes (`images.py`), or which pictures make a batch (`pairs.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from capfilt.data.images import MAX_PIXELS, decode

# CLIP's statistics (arXiv 2103.00020, official code), which BLIP's official code uses for every task.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

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


# ---------------------------------------------------------------------- whole pictures, as they are decoded


@dataclass(frozen=True)
class Views:
    """Random views of whole pictures, each text's its own: a resized crop and a flip by `options`, then RandAugment.

    Unlike `augment`, which has squares already, crops are as published: aspect kept before, bicubic.

    Attributes:
        options: whose scale, ratio and flip count.
        seed: of the run; with step and place in the batch it decides everything, so that ranks change nothing.
        operations, level: `rand_augment`'s n and m.
    """

    options: Augmentation
    seed: int
    operations: int = 0
    level: float = 5

    def view(
        self, picture: npt.NDArray[np.uint8], size: int, step: int, place: int, keep_sides: bool
    ) -> npt.NDArray[np.uint8]:
        """uint8 [3, size, size] of uint8 [H, W, 3], for the text at `place` of batch `step`; `keep_sides`: never flipped."""
        rng = np.random.default_rng([self.seed, step, place])
        left, top, width, height = random_box(picture.shape[1], picture.shape[0], self.options, rng)
        pixels = quick_uint8(picture[top : top + height, left : left + width], size)
        if rng.random() < self.options.flip and not keep_sides:
            pixels = pixels[:, :, ::-1]
        if self.operations:
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            image = rand_augment(image, rng, self.operations, self.level)
            pixels = np.asarray(image).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels)


def random_box(
    width: int, height: int, options: Augmentation, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop, by torchvision's RandomResizedCrop, which BLIP and ALBEF use: ten draws of area and
    ratio, else the largest middle of an allowed ratio. All of the picture, whatever its ratio, where `scale` allows no less.
    """
    low, high = options.ratio
    if options.scale[0] == 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * rng.uniform(*options.scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1)), wide, tall
    wide, tall = min(width, round(height * high)), min(height, round(width / low))
    wide, tall = max(1, wide), max(1, tall)
    return (width - wide) // 2, (height - tall) // 2, wide, tall


# ---------------------------------------------------------------------- batches, on any device


@dataclass(frozen=True)
class Augmentation:
    """What `augment` may do to a training batch; the defaults are a mild crop and nothing else.

    Attributes:
        scale: share of the picture's area a crop keeps, drawn uniformly. BLIP pretrains with 0.2 to 1.0 and finetunes
            with 0.5 to 1.0 (official code).
        ratio: aspect ratio of the crop, drawn log-uniformly (torchvision's RandomResizedCrop default, which BLIP uses).
        flip: chance of a left-right flip. 0 by default, though BLIP uses 0.5: a flip makes "on the left" false.
        translate: largest shift in each direction, as a share of the side; grey comes in from outside.
        brightness: largest relative change of brightness, 0.2 meaning factors from 0.8 to 1.2.
        contrast: largest relative change of contrast around the picture's mean grey.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    translate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} is not 0 < low <= high")
        for name in ("flip", "translate", "brightness", "contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not within [0, 1]")


def augment(
    pixels: Tensor,
    generator: torch.Generator,
    options: Augmentation | None = None,
    *,
    size: int | None = None,
    keep_sides: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A random view of every picture of a batch, in one resampling.

    Args:
        pixels: uint8 [B, 3, H, W] on any device.
        generator: a CPU generator: the same seed gives the same views on every device.
        options: what may happen; `Augmentation()` where None.
        size: side of the views; H and W stay where None. Store pictures larger than the model's input to lose no
            detail to crops.
        keep_sides: bool [B], True where a text names left or right (`mentions_sides`): never flipped.

    Returns:
        views, uint8 [B, 3, size, size], and which were flipped, bool [B] on the CPU.
    """
    options = options or Augmentation()
    count, _, height, width = pixels.shape
    out = (size or height, size or width)
    centre_x, centre_y, half_w, half_h = _crops(count, options, generator, width / height)
    # Everything is drawn whether it is used or not, so that switching one change off leaves the others as they were.
    draws = torch.rand((5, count), generator=generator)
    flipped = draws[0] < options.flip
    if keep_sides is not None:
        flipped &= ~keep_sides.to("cpu", torch.bool)
    shift_x = (draws[1] * 2 - 1) * 2 * options.translate
    shift_y = (draws[2] * 2 - 1) * 2 * options.translate
    theta = torch.zeros((count, 2, 3))
    theta[:, 0, 0] = torch.where(flipped, -half_w, half_w)
    theta[:, 1, 1] = half_h
    theta[:, 0, 2] = centre_x + shift_x
    theta[:, 1, 2] = centre_y + shift_y
    grid = F.affine_grid(theta, [count, 3, *out], align_corners=False).to(pixels.device)
    # grid_sample pads with zeros: take the fill away first, so that zero means the fill.
    fill = torch.tensor(FILL, dtype=torch.float32, device=pixels.device)[:, None, None]
    crop_is_inside = options.translate == 0
    views = F.grid_sample(
        pixels.to(torch.float32) - fill,
        grid,
        mode="bilinear",
        padding_mode="border" if crop_is_inside else "zeros",
        align_corners=False,
    )
    views = views + fill
    if options.brightness:
        factor = 1 + (draws[3] * 2 - 1) * options.brightness
        views = (views * factor.to(views.device)[:, None, None, None]).clamp(0, 255)
    if options.contrast:
        factor = 1 + (draws[4] * 2 - 1) * options.contrast
        grey = (views * _LUMA.to(views.device)).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        views = grey + (views - grey) * factor.to(views.device)[:, None, None, None]
    return views.round_().clamp_(0, 255).to(torch.uint8), flipped


_LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601, as Pillow's "L"
_TRIES = 10  # torchvision's RandomResizedCrop: draws before it settles for a central crop


def _crops(
    count: int, options: Augmentation, generator: torch.Generator, aspect: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres and half sides [count] of crops in grid_sample's coordinates, where the picture spans -1 to 1."""
    draws = torch.rand((count, _TRIES, 2), generator=generator)
    place = torch.rand((count, 2), generator=generator)
    area = options.scale[0] + (options.scale[1] - options.scale[0]) * draws[..., 0]
    low, high = math.log(options.ratio[0]), math.log(options.ratio[1])
    ratio = torch.exp(low + (high - low) * draws[..., 1])
    widths = torch.sqrt(area * ratio / aspect)
    heights = torch.sqrt(area / ratio * aspect)
    fits = (widths <= 1) & (heights <= 1)
    first = fits.to(torch.int8).argmax(1, keepdim=True)
    found = fits.any(1)
    nearest = min(max(aspect, options.ratio[0]), options.ratio[1])
    half_w = torch.where(found, widths.gather(1, first)[:, 0], torch.tensor(min(1.0, nearest / aspect)))
    half_h = torch.where(found, heights.gather(1, first)[:, 0], torch.tensor(min(1.0, aspect / nearest)))
    place = torch.where(found[:, None], place * 2 - 1, torch.zeros(()))
    return place[:, 0] * (1 - half_w), place[:, 1] * (1 - half_h), half_w, half_h


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


def training_views(
    pixels: Tensor,
    seed: Sequence[int],
    options: Augmentation | None = None,
    *,
    operations: int = 2,
    level: float = 5,
    keep_sides: Tensor | None = None,
    workers: int = 1,
) -> Tensor:
    """Crops and flips (`augment`), then RandAugment on each picture: the order of BLIP's official code.

    Args:
        pixels: uint8 [B, 3, H, W] on the CPU.
        seed: decides everything, whatever was drawn before and however many threads there are: (seed of the run, step).
        options, keep_sides: as in `augment`.
        operations, level: `rand_augment`'s n and m.
        workers: pictures worked on at once, in threads.

    Returns uint8 [B, 3, H, W].
    """
    number = int(np.random.SeedSequence([*seed]).generate_state(1, np.uint64)[0]) >> 1
    views = augment(pixels, torch.Generator().manual_seed(number), options, keep_sides=keep_sides)[0]

    def varied(row: int) -> npt.NDArray[np.uint8]:
        image = Image.fromarray(np.ascontiguousarray(views[row].permute(1, 2, 0).numpy()))
        image = rand_augment(image, np.random.default_rng([*seed, row]), operations, level)
        return np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="capfilt-randaugment") as pool:
        return torch.from_numpy(np.stack(list(pool.map(varied, range(len(views))))))
