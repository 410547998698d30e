"""Checkpoints behind the plug-ins' interface: `--captioner` and `--filter` name one where they name no plug-in.

A BLIP captions and scores through the engines of `capfilt.inference`; every family that embeds or matches scores.
"""

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
from capfilt.inference.adapters import opened
from capfilt.inference.captioner import Captioner
from capfilt.inference.engine import PRECISIONS, Encoded, Engine
from capfilt.inference.filter import Filter
from capfilt.inference.graphs import RECORDING
from capfilt.models import build, checkpoint, family_of, kind_named, kind_of
from capfilt.models.common.precision import auto_precision
from capfilt.training.distributed import device

EngineT = TypeVar("EngineT", bound=Engine)
Pixels = npt.NDArray[np.uint8]


class _Checkpoint:
    """A checkpoint in any layout. Raises UserError at once where there is none that can be read.

    Args:
        path: the checkpoint.
        precision: one of `capfilt.inference.engine.PRECISIONS`.
        compiled: whether the vision tower is compiled; "" for not.
        draft: whether decoders scale large JPEGs (`decode_uint8`); "" for not.
    """

    precisions: ClassVar[Sequence[str]] = PRECISIONS

    def __init__(self, path: str, precision: str = "auto", compiled: str = "", draft: str = "") -> None:
        if precision not in self.precisions:
            raise UserError(f"--precision {precision!r}: choose {', '.join(self.precisions)}")
        self.path = Path(path)
        self.precision = precision
        self.compiled = bool(compiled)
        self.draft = bool(draft)
        self.image_size = int(checkpoint.shape_of(self.path).image_size)

    @property
    def device(self) -> torch.device:
        """Where pictures are seen, once `setup` was called."""
        return device()

    def fingerprint(self) -> str:
        return checkpoint.fingerprint(self.path)

    def prepare(self, data: bytes) -> Pixels:
        """uint8 [3, S, S] at the model's size."""
        return decode_uint8(data, self.image_size, draft=self.draft)

    def gather(self, images: list[Pixels]) -> Tensor:
        """uint8 [B, 3, S, S]; for a GPU in memory that it can read by itself."""
        shape, pinned = (len(images), *images[0].shape), self.device.type == "cuda"
        with RECORDING if pinned else nullcontext():
            # PyTorch hands pinned memory out again only once the copies from it have ended.
            batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        return torch.stack([torch.from_numpy(image) for image in images], out=batch)


class _ByEngine(_Checkpoint, Generic[EngineT]):
    """A BLIP behind one of the engines."""

    kind: ClassVar[type[Any]]

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def setup(self) -> None:
        self.engine: EngineT = self.kind.load(self.path, precision=self.precision, compiled=self.compiled)

    def batch_size(self, asked: int, ways: int) -> int:
        """As `Engine.batch_size`."""
        return self.engine.batch_size(asked, ways)

    def computed(self) -> Mapping[str, str]:
        """As `Engine.computed`."""
        return self.engine.computed()


class BlipCaptioner(_ByEngine[Captioner]):
    """The captioner, with all of the stage's options."""

    kind = Captioner

    def caption(
        self, images: Tensor | Encoded, keys: Sequence[str], **options: Any
    ) -> list[tuple[str, float | None]]:
        """As `Captioner.caption`, whose options these are."""
        made = self.engine.caption(images, keys=keys, **options)
        return [(each.text, each.logprob) for each in made]


class BlipFilter(_ByEngine[Filter]):
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


COLUMNS: Mapping[str, tuple[str, str]] = {
    "match": ("itm_score", "softmax of the match logits at the class match, in [0, 1]"),
    "embed": ("itc_score", "cosine of the image and text embeddings, in [-1, 1]"),
}
"""By ability of a model, the column of its scores and what it means."""


class FamilyScorer(_Checkpoint):
    """A checkpoint of any family that embeds or matches. Texts are as long as the model was trained with."""

    precisions = ("auto", "fp32", "bf16")

    def __init__(self, path: str, precision: str = "auto", compiled: str = "", draft: str = "") -> None:
        super().__init__(path, precision, compiled, draft)
        if compiled:
            raise UserError("--compile is for a BLIP's vision tower; leave it out")
        shape = checkpoint.shape_of(self.path)
        with torch.device("meta"):
            model = build(shape)
        self.abilities = [each for each in COLUMNS if each in model.abilities]
        if not self.abilities:
            raise UserError(f"{path}: {kind_of(shape).what}; a filter embeds or matches pictures and texts")
        self.columns = dict(COLUMNS[each] for each in self.abilities)

    def setup(self) -> None:
        contents, _ = checkpoint.open_any(self.path)
        self.model = opened(contents, device(), self.precision).model

    def batch_size(self, asked: int, ways: int) -> int:
        """Pictures at a time: those asked for, or 32."""
        return asked or 32

    def computed(self) -> Mapping[str, str]:
        """The precision, "auto" resolved."""
        chosen = auto_precision(self.model.device) if self.precision == "auto" else self.precision
        return {"precision": chosen}

    def score(
        self, images: Tensor, image_index: Sequence[int], texts: Sequence[str], **_rest: Any
    ) -> npt.NDArray[np.float32]:
        """float32 [texts, columns]."""
        order = sorted(range(len(texts)), key=lambda text: image_index[text])
        index = torch.tensor([image_index[text] for text in order])
        said = [texts[text] for text in order]
        tokens = self.model.encode_images(images)
        found = np.empty((len(texts), len(self.abilities)), dtype=np.float32)
        for column, ability in enumerate(self.abilities):
            if ability == "match":
                values = self.model.match_probability(tokens, index, said)
            else:
                vectors = self.model.embed_images(tokens)[index.to(self.model.device)]
                values = (vectors * self.model.embed_texts(said)).sum(-1).clamp(-1, 1)
            found[order, column] = values.float().cpu().numpy()
        return found


def open_filter(path: str, **how: str) -> BlipFilter | FamilyScorer:
    """The checkpoint as a filter: through BLIP's engine where it is a BLIP, else by what its family can do."""
    kind = kind_named(str(checkpoint.read_config(path)["model_type"]))
    return BlipFilter(path, **how) if family_of(kind.model).name == "blip" else FamilyScorer(path, **how)
