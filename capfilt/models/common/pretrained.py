"""Starting from pretrained towers: a local transformers ViT/DeiT directory for the vision tower, BERT for the text.

Read by a map of tensor names; transformers itself is not needed. Whole BLIP checkpoints are `interop`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models.common.vision import VisionTower, resize_position_embedding
from capfilt.models.common.weights import check_tensors, read_json, read_safetensors

_VIT_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


_VIT_IGNORED = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.")


_TYPES = "embeddings.token_type_embeddings.weight"


_MLM_HEAD = "cls.predictions."


_TIED = ("decoder.",)  # to the word embeddings, and to the head's own bias


_BERT_IGNORED = ("pooler.", "cls.", "embeddings.token_type_embeddings.", "embeddings.position_ids")


def load_vit(tower: VisionTower, directory: str | Path) -> None:
    """Copies a transformers ViT or DeiT (`config.json`, `model.safetensors`) into the tower, as BLIP starts from DeiT.

    Query, key and value are fused; a position embedding of another grid is resized; poolers, classifiers and DeiT's
    distillation token are left behind. Raises UserError when geometry differs or a tensor is missing or left over.
    """
    mine = tower.config
    if mine.trunk or mine.stem != "patch":
        raise UserError(f"{directory}: a ViT starts only a vision tower with stem 'patch' and no trunk")
    copy_vit(Path(directory), dict(tower.named_parameters()), mine, mine.patch_size, mine.grid)


def copy_vit(
    directory: Path, parameters: dict[str, torch.nn.Parameter], mine: Any, patch_size: int, grid: int
) -> None:
    """Copies a transformers ViT or DeiT into parameters that have the names of a vision tower's; as `load_vit`."""
    config, found = _read(directory, ("vit", "deit"))
    geometry = {
        "hidden_size": mine.width,
        "num_hidden_layers": mine.depth,
        "num_attention_heads": mine.heads,
        "intermediate_size": mine.hidden,
        "patch_size": patch_size,
    }
    _check_geometry(directory, config, geometry)
    found = _strip(found, ("vit.", "deit."), _VIT_IGNORED)
    mapped: dict[str, Tensor] = {}
    distilled = found.pop("embeddings.distillation_token", None) is not None
    for name, tensor in found.items():
        if name == "embeddings.position_embeddings":
            if distilled:
                tensor = torch.cat([tensor[:, :1], tensor[:, 2:]], dim=1)
            tensor = resize_position_embedding(tensor, grid)
        mapped[_vit_name(name)] = tensor
    for index in range(mine.depth):
        for leaf in ("weight", "bias"):
            parts = [f"blocks.{index}.{each}.{leaf}" for each in ("query", "key", "value")]
            if all(part in mapped for part in parts):
                mapped[f"blocks.{index}.attn.qkv.{leaf}"] = torch.cat([mapped.pop(part) for part in parts])
    _copy(directory, parameters, mapped)


def load_bert(
    directory: str | Path,
    config: Any,
    stacks: Sequence[nn.Module],
    head: nn.Module | None = None,
    types: bool = False,
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
    """
    directory = Path(directory)
    theirs, found = _read(directory, ("bert",))
    mine = config.text
    geometry = {
        "hidden_size": mine.width,
        "num_hidden_layers": mine.depth,
        "num_attention_heads": mine.heads,
        "intermediate_size": mine.hidden,
        "max_position_embeddings": mine.max_positions,
        "vocab_size": config.vocab_size - len(ADDED),
    }
    _check_geometry(directory, theirs, geometry)
    language = _strip(
        {name: each for name, each in found.items() if name.startswith(_MLM_HEAD)}, (_MLM_HEAD,), _TIED
    )
    kinds = next((found[name] for name in (_TYPES, f"bert.{_TYPES}") if name in found), None)
    found = _strip(found, ("bert.",), _BERT_IGNORED)
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    if words in found:
        own = dict(stacks[0].named_parameters())[words].detach()
        found[words] = torch.cat([found[words], own[len(found[words]) :].cpu()])
    if types and kinds is not None and positions in found:
        found[positions] = found[positions] + kinds[0]
    if head is not None and language:
        _copy(directory, dict(head.named_parameters()), language)
    for stack in stacks:
        parameters = dict(stack.named_parameters())
        _copy(
            directory, {key: each for key, each in parameters.items() if "crossattention" not in key}, found
        )


def _vit_name(name: str) -> str:
    """The tower's name of a transformers ViT tensor; query, key and value keep a name of their own until fused."""
    fixed = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    if name in fixed:
        return fixed[name]
    parts = name.split(".")
    if parts[:2] != ["encoder", "layer"]:
        return name
    body, leaf = ".".join(parts[3:-1]), parts[-1]
    body = (
        body.removeprefix("attention.attention.")
        if body.startswith("attention.attention.")
        else _VIT_BLOCK.get(body, body)
    )
    return f"blocks.{parts[2]}.{body}.{leaf}"


def _read(directory: Path, model_types: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; save the model with transformers' save_pretrained")
    config = read_json(config_path)
    if config.get("model_type") not in model_types:
        raise UserError(f"{config_path}: model_type is not {' or '.join(model_types)}")
    return config, read_safetensors(weights_path)


def _check_geometry(directory: Path, config: dict[str, Any], wanted: dict[str, int]) -> None:
    wrong = [
        f"{key} {config.get(key)} instead of {value}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    if wrong:
        raise UserError(f"{directory / 'config.json'}: not this model's geometry: {', '.join(wrong)}")


def _strip(
    found: dict[str, Tensor], prefixes: tuple[str, ...], ignored: tuple[str, ...]
) -> dict[str, Tensor]:
    """Without the class's prefix and without the tensors that have no place here."""
    named = {}
    for name, tensor in found.items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if not name.startswith(ignored):
            named[name] = tensor
    return named


def _copy(directory: Path, parameters: dict[str, torch.nn.Parameter], found: dict[str, Tensor]) -> None:
    check_tensors(directory / "model.safetensors", {k: p.detach() for k, p in parameters.items()}, found)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found[name])
