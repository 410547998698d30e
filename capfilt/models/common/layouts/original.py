"""The layout `original`, as BLIP and ALBEF share it: a `.pth` of a model class of their repositories, under the key `model`.

Such a file holds no geometry: sizes are read off the tensors, numbers of heads follow from the 64 channels a head of both.
Which class a file is of, and the heads beside the two towers, are each family's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capfilt.models.common.config import Shape
from capfilt.models.common.layouts import vocabulary
from capfilt.models.common.layouts.contents import SETTINGS
from capfilt.models.common.layouts.engine import Layout, Sizes, Vocabulary, refuse_convolutions
from capfilt.models.common.layouts.names import COPIED, TYPED, Rows

HEAD_CHANNELS = 64  # BLIP, code: ViT-B 768/12, ViT-L 1024/16, BERT 768/12
ENCODER, DECODER = "text_encoder.", "text_decoder.bert."
TYPES = "embeddings.token_type_embeddings.weight"
"""Of ALBEF's BERT; no BLIP has it."""
WORDPIECES = Vocabulary(vocabulary.find, vocabulary.read, vocabulary.write)

TOWER: Rows = (("visual_encoder.**", "visual_encoder.**"),)
HEADS: Rows = (
    ("vision_proj.*", "vision_proj.*"),
    ("text_proj.*", "text_proj.*"),
    ("itm_head.*", "itm_head.*"),
    ("cls_head.**", "cls_head.**"),
    ("temperature", "temp"),
)


def bert(
    ours: str, theirs: str, head: str = "", their_head: str = "", *, types: bool = False, written: bool = True
) -> Rows:
    """Rows of a BERT whose modules follow `ours`, and of its language head.

    types: whether it has token types. written: whether copies of tied tensors and positions that count are written.
    """
    extra = "+" if written else "?"
    words = f"{theirs}embeddings.word_embeddings.weight"
    places = (
        f"position_embeddings.weight,{'token_type_embeddings.weight+,' if types else ''}position_ids{extra}"
    )
    rows: Rows = (
        (f"{ours}embeddings.position_embeddings.weight", f"{theirs}embeddings.{{{places}}}", TYPED),
    )
    if head:
        rows += (
            (
                f"{ours}embeddings.word_embeddings.weight",
                f"{{{words},{their_head}decoder.weight{extra}}}",
                COPIED,
            ),
            (f"{head}bias", f"{their_head}{{bias,decoder.bias{extra}}}", COPIED),
            (f"{head}**", f"{their_head}**"),
        )
    return (*rows, (f"{ours}**", f"{theirs}**"))


def measured(tensors: Sizes, settings: dict[str, Any], root: str, depth: int = 0) -> dict[str, Any]:
    """Fields of a config by dotted name, of a file whose first BERT's names begin with `root`; depth: its layers, 0: all.

    Where the tensors tell the width of the contrast, it is taken from the settings.
    """
    tower, first = "visual_encoder.", f"{root}encoder.layer."
    values = tensors.table(
        {
            "vision.width": (f"{tower}patch_embed.proj.weight", 0),
            "vision.patch_size": (f"{tower}patch_embed.proj.weight", 3),
            "vision.hidden": (f"{tower}blocks.0.mlp.fc1.weight", 0),
            "text.vocab_size": (f"{root}embeddings.word_embeddings.weight", 0),
            "text.width": (f"{root}embeddings.word_embeddings.weight", 1),
            "text.hidden": (f"{first}0.intermediate.dense.weight", 0),
            "text.max_positions": (f"{root}embeddings.position_embeddings.weight", 0),
        }
    )
    values["vision.image_size"] = tensors.grid(f"{tower}pos_embed", 1) * values["vision.patch_size"]
    values["vision.depth"] = tensors.count(f"{tower}blocks.")
    values["text.depth"] = depth or tensors.count(first)
    for side in ("vision", "text"):
        width, given = values[f"{side}.width"], settings.get(f"{side}.heads")
        cure = f"{SETTINGS} with settings '{side}.heads' beside it"
        known = isinstance(given, int)
        values[f"{side}.heads"] = given if known else tensors.heads(width, HEAD_CHANNELS, width, cure)
    return values


def is_albef(found: Mapping[str, Tensor]) -> bool:
    """Whether a file with a text encoder is ALBEF's: its BERT has a language head around it, or token types."""
    return f"{ENCODER}{TYPES}" in found or any(name.startswith(f"{ENCODER}bert.") for name in found)


def contrast(tensors: Sizes, settings: dict[str, Any]) -> dict[str, Any]:
    """The width of the contrast, where the tensors tell it: they decide over the settings."""
    if "vision_proj.weight" not in tensors.found:
        return {}
    settings.pop("embed_dim", None)
    return {"embed_dim": tensors.size("vision_proj.weight", 0)}


def refuse(config: Shape, tokenizer: Any) -> None:
    """NoHome for a vision tower or a vocabulary that the original code has no place for."""
    refuse_convolutions(config, "the original layout")
    vocabulary.refuse_unlike_bert(config.vocab_size, tokenizer)


layout = functools.partial(
    Layout,
    "original",
    said=lambda config, tokenizer: {},
    vocabulary=WORDPIECES,
    no_home=(
        "vision.drop_path", "vision.trunk_frozen", "vision.heads", "text.heads", "text.dropout", "text.attention_dropout",
        "embed_dim", "max_text_tokens", "max_words", "prompt", "classes",
    ),
    config="",
    weights="model.pth",
    resizes=True,
    suffixes=(".pth", ".pt"),
)  # fmt: skip
