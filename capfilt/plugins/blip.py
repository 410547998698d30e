"""BLIP checkpoints behind the plug-ins' interface: what `--captioner` and `--filter` name when they name no plug-in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capfilt.data.transforms import decode_uint8
from capfilt.errors import UserError
from capfilt.inference.captioner import Captioner
from capfilt.inference.engine import PRECISIONS, Encoded, Engine
from capfilt.inference.filter import Filter
from capfilt.inference.graphs import RECORDING
from capfilt.models import checkpoint

EngineT = TypeVar("EngineT", bound=Engine)
Pixels = npt.NDArray[np.uint8]


class _Checkpoint(Generic[EngineT]):
    """A checkpoint in any layout. Raises UserError at once where there is none that can be read.

    precision: one of `capfilt.inference.engine.PRECISIONS`. compiled: whether the vision tower is; "" for not. draft: whether
    decoders scale large JPEGs (`decode_uint8`); "" for not.
    """

    kind: ClassVar[type[Any]]

    def __init__(self, path: str, precision: str = "auto", compiled: str = "", draft: str = "") -> None:
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.path = Path(path)
        self.precision = precision
        self.compiled = bool(compiled)
        self.draft = bool(draft)
        checkpoint.read_config(self.path)

    def fingerprint(self) -> str:
        return checkpoint.fingerprint(self.path)

    def setup(self) -> None:
        self.engine: EngineT = self.kind.load(self.path, precision=self.precision, compiled=self.compiled)

    def batch_size(self, asked: int, ways: int) -> int:
        """As `Engine.batch_size`."""
        return self.engine.batch_size(asked, ways)

    def computed(self) -> Mapping[str, str]:
        """As `Engine.computed`."""
        return self.engine.computed()

    def prepare(self, data: bytes) -> Pixels:
        """uint8 [3, S, S] at the model's size."""
        return decode_uint8(data, self.engine.model.config.image_size, draft=self.draft)

    def gather(self, images: list[Pixels]) -> Tensor:
        """uint8 [B, 3, S, S]; for a GPU in memory that it can read by itself."""
        shape, pinned = (len(images), *images[0].shape), self.engine.device.type == "cuda"
        with RECORDING if pinned else nullcontext():
            # PyTorch hands pinned memory out again only once the copies from it have ended.
            batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        return torch.stack([torch.from_numpy(image) for image in images], out=batch)


class BlipCaptioner(_Checkpoint[Captioner]):
    """The captioner, with all of the stage's options."""

    kind = Captioner

    def caption(
        self, images: Tensor | Encoded, keys: Sequence[str], **options: Any
    ) -> list[tuple[str, float | None]]:
        """As `Captioner.caption`, whose options these are."""
        made = self.engine.caption(images, keys=keys, **options)
        return [(each.text, each.logprob) for each in made]


class BlipFilter(_Checkpoint[Filter]):
    """The filter. Its columns have their place in the contract of `scores`."""

    kind = Filter
    columns: Mapping[str, str] = {
        "itm_score": "softmax(itm_logits)[1] of the image-grounded encoder fed [ENC], in [0, 1]",
        "itc_score": "cosine of the unimodal image and text embeddings, in [-1, 1]",
    }

    def score(
        self,
        images: Tensor | Encoded,
        image_index: Sequence[int],
        texts: Sequence[str],
        **options: Any,
    ) -> list[tuple[float, float]]:
        """As `Filter.score_texts`, whose options these are."""
        made = self.engine.score_texts(images, image_index, texts, **options)
        return [(each.itm_score, each.itc_score) for each in made]
