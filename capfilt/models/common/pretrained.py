"""Starting from pretrained towers: a local transformers ViT/DeiT directory for the vision tower, BERT for the text.

Read by tables of names (`common.layouts.names`); transformers itself is not needed. Whole BLIP checkpoints are `layouts`'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models.common.layouts.names import GEOMETRY, TYPED, VIT_BLOCK, Change, Rows, take, under
from capfilt.models.common.vision import VisionTower, resize_position_embedding
from capfilt.models.common.weights import check_tensors, read_json, read_safetensors

_MLM_HEAD, _TYPES = "cls.predictions.", "embeddings.token_type_embeddings."


def _on_grid(found: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Positions on the tower's grid, without DeiT's distillation token."""
    tensor, *distilled = found.values()
    if distilled:
        tensor = torch.cat([tensor[:, :1], tensor[:, 2:]], dim=1)
    return resize_position_embedding(tensor, round((wanted.shape[1] - 1) ** 0.5))


def _filled_up(found: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Embeddings whose last rows, of tokens that BERT does not have, keep their values."""
    (tensor,) = found.values()
    return torch.cat([tensor, wanted[len(tensor) :].cpu()])


_VIT: Rows = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.{position_embeddings,distillation_token?}", Change(_on_grid)),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("norm.*", "layernorm.*"),
    *under("blocks", "encoder.layer", VIT_BLOCK),
)
_WORDS, _PLACES = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
_BERT: Rows = (
    (_WORDS, _WORDS, Change(_filled_up)),
    (_PLACES, f"{{{_PLACES},{_TYPES}weight?,embeddings.position_ids?}}", TYPED),
    ("**", "**"),
)


def load_vit(tower: VisionTower, directory: str | Path) -> None:
    """Copies a transformers ViT or DeiT (`config.json`, `model.safetensors`) into the tower, as BLIP starts from DeiT.

    Query, key and value are fused; a position embedding of another grid is resized; poolers, classifiers and DeiT's
    distillation token are left behind. Raises UserError when geometry differs or a tensor is missing or left over.
    """
    mine = tower.config
    if mine.trunk or mine.stem != "patch":
        raise UserError(f"{directory}: a ViT starts only a vision tower with stem 'patch' and no trunk")
    copy_vit(Path(directory), dict(tower.named_parameters()), mine, mine.patch_size)


def copy_vit(directory: Path, parameters: dict[str, nn.Parameter], mine: Any, patch_size: int) -> None:
    """Copies a transformers ViT or DeiT into parameters that have the names of a vision tower's; as `load_vit`."""
    _check_geometry(directory, ("vit", "deit"), mine, {"patch_size": patch_size})
    left = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.")
    _copy(directory, "ViT", _VIT, parameters, _found(directory, ("vit.", "deit."), left))


def load_bert(
    directory: str | Path,
    config: Any,
    stacks: Sequence[nn.Module],
    head: nn.Module | None = None,
    types: bool = False,
    depth: int = 0,
) -> None:
    """Copies a transformers BERT into text transformers: embeddings, self-attention and feed-forward.

    Cross-attention, the extra ids' rows and other heads keep their fresh values, as in BLIP's and ALBEF's papers. Raises
    UserError when geometry differs or a tensor is missing or left over.

    Args:
        directory: of `config.json` and `model.safetensors`.
        config: the whole model's, with `text` and `vocab_size`.
        stacks: the text transformers to fill.
        head: a language head, filled where the directory has one.
        types: whether the type that all words have is added to the positions, for a transformer without types.
        depth: the directory's layers, of which the first are taken; 0: as many as the model has.
    """
    directory = Path(directory)
    positions, words = config.text.max_positions, config.vocab_size - len(ADDED)
    sizes = {"max_position_embeddings": positions, "vocab_size": words}
    theirs = dataclasses.replace(config.text, depth=depth or config.text.depth)
    _check_geometry(directory, ("bert",), theirs, sizes)
    found = _found(directory, ("bert.",), ("pooler.", f"{_MLM_HEAD}decoder.", *(() if types else (_TYPES,))))
    language = {name: each for name, each in found.items() if name.startswith(_MLM_HEAD)}
    beyond = (f"encoder.layer.{index}." for index in range(config.text.depth, theirs.depth))
    left = ("cls.", *beyond)
    found = {name: each for name, each in found.items() if not name.startswith(left)}
    if head is not None and language:
        _copy(directory, "BERT", (("**", f"{_MLM_HEAD}**"),), dict(head.named_parameters()), language)
    for stack in stacks:
        parameters = {name: each for name, each in stack.named_parameters() if "crossattention" not in name}
        _copy(directory, "BERT", _BERT, parameters, found)


def _check_geometry(directory: Path, model_types: tuple[str, ...], mine: Any, sizes: dict[str, int]) -> None:
    """UserError where the directory's config.json is of another kind of model, or of another size."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; save the model with transformers' save_pretrained")
    config = read_json(path)
    if config.get("model_type") not in model_types:
        raise UserError(f"{path}: model_type is not {' or '.join(model_types)}")
    fields = zip(("width", "depth", "heads", "hidden"), GEOMETRY, strict=True)
    wanted = {**{theirs: getattr(mine, own) for own, theirs in fields}, **sizes}
    wrong = [
        f"{key} {config.get(key)} instead of {value}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    if wrong:
        raise UserError(f"{path}: not this model's geometry: {', '.join(wrong)}")


def _found(directory: Path, prefixes: tuple[str, ...], left: tuple[str, ...]) -> dict[str, Tensor]:
    """The directory's tensors without the class's prefix, but those that have no place here."""
    named = {}
    for name, tensor in read_safetensors(directory / "model.safetensors").items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if not name.startswith(left):
            named[name] = tensor
    return named


def _copy(
    directory: Path, who: str, rows: Rows, parameters: Mapping[str, nn.Parameter], found: Mapping[str, Tensor]
) -> None:
    path = directory / "model.safetensors"
    own = {name: each.detach() for name, each in parameters.items()}
    state, _ = take(path, who, rows, own, found)
    check_tensors(path, own, state)
    for name, tensor in own.items():
        tensor.copy_(state[name])
