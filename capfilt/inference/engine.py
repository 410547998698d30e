"""What captioner and filter have in common: a loaded model on a device, its precision, and pictures made into tensors.

What is asked of the model is captioner.py's and filter.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from capfilt.data.images import BadImage
from capfilt.data.tokenizer import Tokenizer
from capfilt.data.transforms import decode_uint8, to_uint8
from capfilt.errors import UserError
from capfilt.inference.capacity import batch_that_fits
from capfilt.inference.compiling import compiled_tower
from capfilt.inference.cross import CrossProjections
from capfilt.inference.decode_attention import read_by_kernel
from capfilt.inference.lowbit import Int8Linear, bf16_model, fp8_model, int8_model
from capfilt.inference.memory import give_back, out_of_memory
from capfilt.models import checkpoint
from capfilt.models.blip.model import Blip
from capfilt.models.common.precision import auto_precision
from capfilt.models.common.vision import VisionTower


@dataclass(frozen=True)
class Encoded:
    """Image tokens [B, N, Dv] as a vision tower made them, for every engine whose tower is the same.

    In the parts that they were made in: putting a whole batch together would want memory for it a second time.
    """

    parts: Sequence[Tensor]
    tower: VisionTower

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows(self, chosen: Sequence[int]) -> Tensor:
        """The tokens of the chosen images (at least one, ascending), a view where they lie side by side."""
        found, first = [], 0
        for part in self.parts:
            here = [index - first for index in chosen if first <= index < first + len(part)]
            first += len(part)
            if here:
                found.append(_picked(part, here))
        return found[0] if len(found) == 1 else torch.cat(found)


ImageLike = Image.Image | bytes | str | PathLike[str]
Pixels = Tensor | npt.NDArray[np.uint8] | npt.NDArray[np.float16]
Images = Sequence[ImageLike] | Encoded | Pixels


PRECISIONS = ("auto", "fp32", "bf16", "int8", "fp8")
"""auto: bf16 on a GPU, fp32 on a processor, where bf16 is slower unless it has AMX; int8: on processors; fp8: the vision
tower on GPUs that have it, the rest in bf16, and only compiled: else every quantisation is kernels of its own."""

_IN: dict[str, tuple[Callable[[Blip], Blip], Callable[[nn.Linear], nn.Module]]] = {
    "fp32": (Blip.eval, nn.Linear.eval),
    "bf16": (bf16_model, nn.Linear.bfloat16),
    "int8": (int8_model, Int8Linear),
    "fp8": (fp8_model, nn.Linear.bfloat16),
}
"""What each makes of a model, and of a linear layer of its text side."""

T = TypeVar("T")


class Engine:
    """A Blip in evaluation mode, in one of `PRECISIONS`; answers are always fp32. What is trained further needs a new one.

    Attributes:
        precision: the one it computes in, never "auto".
        fits: the largest batch that is known to fit, once one did not; 0 before.
        together: this engine and those that share its vision tower, and so the device.
    """

    half: ClassVar[str]  # which half of a Blip the engine needs, "captioner" or "filter"

    def __init__(
        self, model: Blip, tokenizer: Tokenizer, precision: str = "auto", compiled: bool = False
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        model.require(self.half)
        self.device = next(model.parameters()).device
        if precision == "auto":
            precision = auto_precision(self.device)
        low = precision in ("bf16", "fp8")
        make, convert = _IN[precision]
        self.model = make(model).eval()
        if precision == "fp8" and not compiled:
            raise UserError(
                "precision 'fp8' needs compiled=True (--compile): by itself every quantisation is kernels of its own, "
                "which 'bf16' does without"
            )
        self.cross = CrossProjections(model, convert)
        self.precision = precision
        self.reader = None
        if low and self.device.type == "cuda":
            with self._current():
                # Of the engine's own copy, which a low precision is.
                self.reader = read_by_kernel(self.model)
        self.compiled = compiled_tower(self.model) if compiled else None
        self.tokenizer = tokenizer
        self.low_precision = low
        self.fits = 0
        self.together: list[Engine] = [self]

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        device: str | torch.device | None = None,
        precision: str = "auto",
        image_size: int = 0,
        compiled: bool = False,
    ) -> Self:
        """From a checkpoint, onto `device` (None: a GPU if any). UserError names a file that is wrong.

        `path` is a capfilt directory, a transformers BLIP directory, or an original `.pth`; `image_size` other than 0
        resizes the position embedding to pictures of that side; `compiled`: see `compiled_tower`.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer, _ = checkpoint.load(Path(path), device, image_size)
        try:
            return cls(model, tokenizer, precision, compiled)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def computed(self) -> dict[str, str]:
        """How answers are computed here: the `precision` ("auto" resolved), the `device`, and the `attention` that decode steps
        read the image with. Cards of one name, with the same libraries and options, round alike.
        """
        on_gpu = self.device.type == "cuda"
        return {
            "precision": self.precision,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            "attention": self.reader.name if self.reader is not None else "sdpa",
        }

    def autocast(self) -> AbstractContextManager[None]:
        """The precision everything is computed in."""
        # Nothing is kept converted: see `bf16_model`.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.low_precision, cache_enabled=False
        )

    def batch_size(self, asked: int, ways: int = 1) -> int:
        """Images at a time: as many as are asked for, or for 0 what `batch_that_fits` finds; fewer once those did not fit.

        ways: texts that are written per image. Engines that share a GPU share its memory alike.
        """
        if asked < 0:
            raise UserError(f"batch_size is {asked}: it must be at least 1, or 0 for as many as fit")
        itemsize = 2 if self.low_precision else 4
        size = asked or batch_that_fits(self.model.config, self.device, ways, itemsize, len(self.together))
        return min(size, self.fits or size)

    def in_batches(self, count: int, size: int, work: Callable[[int, int], list[T]]) -> list[T]:
        """What `work(first, last)` gives for ranges of at most `size` of `count`, one after the other.

        A range that a GPU's memory cannot hold is done again once everything kept for speed is gone, then in halves, and so
        is what follows: no row is lost. UserError where a single one does not fit.
        """
        made: list[T] = []
        first, failed = 0, False
        while first < count:
            last = min(first + size, count)
            try:
                with self._current():
                    made += work(first, last)
                first, failed = last, False
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                said = str(error).splitlines()[0]
            # Here, where the error and the tensors in its frames are gone.
            for engine in self.together:
                engine.release()
            give_back()
            if not failed:
                # With what was kept for speed gone, it may fit after all.
                failed = True
            elif last - first == 1:
                raise UserError(f"one image at a time does not fit on the GPU: {said}")
            else:
                self.fits = size = (last - first) // 2
                failed = False
        return made

    def _current(self) -> AbstractContextManager[object]:
        """The engine's device as PyTorch's current one, whose streams and properties are meant where no tensor says more."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def release(self) -> None:
        """Lets go of what is kept for speed alone; called when memory is out."""

    @torch.inference_mode()
    def encode(self, images: Images) -> Encoded:
        """The images' tokens, to be given in place of images: to this engine again, or to one that shares its tower."""
        parts = self.in_batches(
            len(images),
            self.batch_size(len(images)),
            lambda first, last: [self.tokens(images, range(first, last))],
        )
        return Encoded(parts, self.model.visual_encoder)

    def share_vision(self, other: Engine) -> None:
        """From now on `other` encodes with this engine's vision tower, so that one `encode` serves both.

        UserError where the towers differ in anything: each model reads its own tower's tokens only. They are the same where
        both were finetuned with `--freeze vision` from one checkpoint.
        """
        mine = self.model.visual_encoder
        if (
            not same_tower(mine, other.model.visual_encoder)
            or self.device != other.device
            or self.low_precision != other.low_precision
        ):
            raise UserError(
                "the two models' vision towers differ, so each needs its own: finetune both with --freeze vision from one "
                "checkpoint, and load them on the same device in the same precision"
            )
        other.model.visual_encoder = mine
        other.compiled = self.compiled
        self.together.append(other)
        other.together = self.together

    def tokens(self, images: Images, chosen: Sequence[int]) -> Tensor:
        """Image tokens [B, N, Dv] of the chosen images, on the device. Raises UserError as `tensor`."""
        if isinstance(images, Encoded):
            if images.tower is not self.model.visual_encoder:
                raise UserError("these images were encoded by another vision tower: see Engine.share_vision")
            return images.rows(chosen)
        with self.autocast():
            pixels = self.tensor(images, chosen)
            if self.compiled is None:
                return self.model.encode_image(pixels)
            # One compilation for batches of any size: the last of a shard is smaller.
            torch._dynamo.maybe_mark_dynamic(pixels, 0)
            return self.compiled(pixels)

    def tensor(self, images: Sequence[ImageLike] | Pixels, chosen: Sequence[int]) -> Tensor:
        """The chosen images on the device: uint8 [B, 3, S, S], or cached trunk features as they came.

        Raises UserError naming the index of an image that cannot be read.
        """
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images)
        if isinstance(images, Tensor):
            self._check(images)
            return self._sent(_picked(images, chosen))
        size = self.model.config.image_size
        rows = [pixels(images[index], size, index) for index in chosen]
        return self._sent(torch.from_numpy(np.stack(rows)))

    def _sent(self, images: Tensor) -> Tensor:
        """On the device. Bytes travel, from pinned memory, while the GPU computes; the model normalises them there."""
        if self.device.type == "cuda" and images.device.type == "cpu" and not images.is_pinned():
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True)

    def _check(self, images: Tensor) -> None:
        size = self.model.config.image_size
        trunk = self.model.visual_encoder.trunk is not None
        is_pixels = images.dtype == torch.uint8 and tuple(images.shape[1:]) == (3, size, size)
        is_features = trunk and images.dim() == 3 and images.is_floating_point()
        if not is_pixels and not is_features:
            wanted = f"uint8 [B, 3, {size}, {size}]" + (" or float features [B, N, C]" if trunk else "")
            raise UserError(f"images are {images.dtype} {list(images.shape)}; this model takes {wanted}")


def _picked(rows: Tensor, chosen: Sequence[int]) -> Tensor:
    """The chosen rows."""
    if list(chosen) == list(range(chosen[0], chosen[0] + len(chosen))):
        # A view: copying a batch takes as long as a third of its vision pass on a GPU.
        return rows[chosen[0] : chosen[0] + len(chosen)]
    return rows[torch.as_tensor(chosen, device=rows.device)]


def same_tower(one: VisionTower, other: VisionTower) -> bool:
    """Whether two vision towers give the same tokens: equal shapes and weights."""
    own, others = one.state_dict(), other.state_dict()
    return (
        one.config == other.config
        and own.keys() == others.keys()
        # As floats: there is no comparing in fp8.
        and all(torch.equal(each.float(), others[name].to(each.device).float()) for name, each in own.items())
    )


def pixels(image: ImageLike, size: int, index: int) -> npt.NDArray[np.uint8]:
    """uint8 [3, size, size] of a picture, its encoded bytes or its path; UserError names `index` when unreadable.

    Upright by its EXIF, alpha on white, bicubic, aspect not kept (BLIP, code: evaluation transform).
    """
    try:
        if isinstance(image, Image.Image):
            return to_uint8(_upright_rgb(image), size)
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        return decode_uint8(data, size)
    except BadImage as error:
        raise UserError(f"image {index} cannot be used: {error}") from error
    except OSError as error:
        raise UserError(f"image {index} cannot be read: {error}") from error
    except TypeError as error:
        raise UserError(
            f"image {index} is a {type(image).__name__}: give a PIL image, bytes or a path"
        ) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")
