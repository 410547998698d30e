"""Judges side by side: how well each ranks the own texts of held-out human pictures above foreign ones.

Not here: probabilities (`stage.py`), the training that ends with such a comparison (`capfilt.stages.train`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from capfilt.calibration.ranking import roc_auc
from capfilt.data.transforms import decode_uint8
from capfilt.errors import UserError
from capfilt.inference.adapters import Opened, opened
from capfilt.models import checkpoint
from capfilt.plugins.checkpoints import COLUMNS
from capfilt.stages.calibrate.held_out import Pairs, human_texts, pairs_of, trained_on
from capfilt.stages.calibrate.judging import BATCH, as_array, read
from capfilt.stages.pixels import pictures
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

NEGATIVES = 10


class HeldOut:
    """Human pictures that no judge saw, and the judges beside the one that is trained.

    Raises UserError where the part has too few pictures, where one of them trained a judge, and where one is no judge.
    """

    def __init__(self, name: str, against: tuple[str, ...], workspace: Workspace, seed: int) -> None:
        self.given = f"--held-out {name}"
        self.part = workspace.input("images", name)
        self.pairs = pairs_of(human_texts(self.part), NEGATIVES, seed, self.given)
        self.against = {other: workspace.model(other) for other in against}
        for other, path in self.against.items():
            checkpoint.read_config(path)
            self.refuse(trained_on(path, workspace) or set(), other)

    def refuse(self, seen: set[str], judge: str) -> None:
        """UserError where a picture is among those that a judge saw."""
        if both := len(seen & self.pairs.keys()):
            raise UserError(
                f"{self.given}: {both:,} of its {len(self.pairs):,} pictures trained {judge}; give pictures that it never saw"
            )

    def areas(self, own: Opened) -> dict[str, float]:
        """ROC-AUC by judge and column, as `own itc_score`; the one that was trained is `own`."""
        found: dict[str, float] = {}
        for name in ("own", *self.against):
            judge = own if name == "own" else self._opened(name, own.model.device)
            for column, area in areas(judge, self.part, self.pairs).items():
                found[f"{name} {column}"] = area
        return found

    def _opened(self, name: str, where: torch.device) -> Opened:
        contents, _ = checkpoint.open_any(self.against[name])
        judge = opened(contents, where)
        if not hasattr(judge.model, "embed_texts") and not hasattr(judge.model, "match_probability"):
            raise UserError(f"--against {name}: {judge.what}; a judge embeds or matches pictures and texts")
        return judge


def areas(judge: Opened, part: Part, pairs: Pairs) -> dict[str, float]:
    """ROC-AUC of each of a judge's columns on pairs of a part's pictures."""
    own: list[bool] = []
    values: dict[str, list[np.ndarray[Any, np.dtype[np.float32]]]] = {}
    for shard in part.shards():
        for batch in pictures(part, shard, _Squares(judge.image_size), BATCH, only=pairs):
            decoded = batch.decoded
            if not decoded:
                continue
            rows = [(place, row) for place, image in enumerate(decoded) for row in pairs[image]]
            index = torch.tensor([place for place, _ in rows])
            texts = [row["text"] for _, row in rows]
            own += [row["own"] for _, row in rows]
            for name, column in _columns(judge.model, batch.images, index, texts).items():
                values.setdefault(name, []).append(column)
    return {name: roc_auc(np.concatenate(found), own) for name, found in values.items()}


def _columns(
    model: Any, images: torch.Tensor, index: torch.Tensor, texts: list[str]
) -> Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]:
    tokens = model.encode_images(images)
    found = {}
    if hasattr(model, "embed_texts"):
        seen, said = as_array(model.embed_images(tokens))[index.numpy()], read(model.embed_texts, texts)
        found[COLUMNS["embed"][0]] = np.einsum("te,te->t", seen, said)
    if hasattr(model, "match_probability"):
        found[COLUMNS["match"][0]] = as_array(model.match_probability(tokens, index, texts))
    return found


class _Squares:
    """Pictures as uint8 squares, as a plug-in prepares them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def fingerprint(self) -> str:
        return str(self.size)

    def setup(self) -> None:
        """Nothing."""

    def prepare(self, data: bytes) -> Any:
        return decode_uint8(data, self.size)

    def gather(self, images: list[Any]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(image) for image in images])
