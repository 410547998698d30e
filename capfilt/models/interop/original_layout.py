"""The original repositories' `.pth` files: the tensors of one of their model classes, as a rule under the key `model`.

BLIP's pretraining (BLIP_Pretrain), captioning (BLIP_Decoder), retrieval (BLIP_Retrieval), VQA (BLIP_VQA) and NLVR2
(BLIP_NLVR); ALBEF's pretraining, which is told by its text encoder's being a BERT with a language head, and its retrieval, VQA,
NLVR2 and SNLI-VE, which are told by their token types. Such a file holds no geometry: sizes are read off the tensors, numbers
of heads follow from the 64 channels a head of both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models import family_of
from capfilt.models.albef.model import AlbefConfig, alone
from capfilt.models.albef.tasks import AlbefClassifierConfig, AlbefNlvrConfig, AlbefVqaConfig, second_half
from capfilt.models.blip.model import LARGE, BlipConfig
from capfilt.models.blip.tasks import NlvrConfig
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.weights import read_pickled
from capfilt.models.interop import vocabulary
from capfilt.models.interop.contents import (
    SETTINGS,
    Contents,
    NoHome,
    assemble,
    blip_of,
    no_blip,
    read_settings,
    refuse_convolutions,
    remember,
    resized,
    settings_of,
    take,
    unwrapped,
    with_settings,
    write_beside,
)
from capfilt.models.interop.keymaps import TIED, AlbefShape, Config, blip_kind, original_names
from capfilt.tables.contracts import LABELS

WEIGHTS = "model.pth"
SUFFIXES = (".pth", ".pt")
HEAD_CHANNELS = 64  # BLIP, code: ViT-B 768/12, ViT-L 1024/16, BERT 768/12
NO_HOME = (
    "vision.drop_path",
    "vision.trunk_frozen",
    "vision.heads",
    "text.heads",
    "text.dropout",
    "text.attention_dropout",
    "embed_dim",
    "max_text_tokens",
    "max_words",
    "prompt",
    "classes",
)
STACKS = ("text_encoder.bert.", "text_encoder.", "text_decoder.bert.")
"""Where a file may have a BERT; what follows are names in it."""
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
_SHAPES: dict[str, type[Config | AlbefShape]] = {
    "vqa": VqaConfig,
    "nlvr": NlvrConfig,
    "albef": AlbefConfig,
    "albef_vqa": AlbefVqaConfig,
    "albef_nlvr": AlbefNlvrConfig,
    "albef_classifier": AlbefClassifierConfig,
}


def files(path: Path) -> list[Path]:
    """Every file that `read` reads."""
    settings = path.parent / SETTINGS
    return [path, vocabulary.find(path.parent), *([settings] if settings.is_file() else [])]


def read_config(path: Path, image_size: int = 0) -> tuple[Config | AlbefShape, dict[str, Any]]:
    """(our config, `extra`), only the sizes of the tensors looked at."""
    return _config(path, _state(path, mapped=True), image_size)


def read(path: Path, image_size: int = 0) -> Contents:
    """The checkpoint; `image_size` other than 0 resizes the position embedding. UserError names the file or key."""
    found = _state(path)
    config, extra = _config(path, found, image_size)
    if isinstance(config, AlbefShape):
        found = _without_types(found)
    state, leftovers = take(path, found, original_names(config))
    tokenizer = vocabulary.read(path.parent, config.vocab_size)
    return Contents(assemble(path, config, resized(path, config, state)), tokenizer, extra, leftovers)


def write(directory: Path, contents: Contents) -> None:
    """Writes model.pth, vocab.txt and capfilt.json into an empty directory; UserError where something has no home."""
    model = contents.model if family_of(contents.model).name == "albef" else blip_of(contents)
    config = model.config
    refuse(config, contents.tokenizer)
    state = model.state_dict()
    weights = {
        theirs: state[ours].detach().cpu().contiguous() for ours, theirs in original_names(config).items()
    }
    for copied, main in TIED.items():
        if main in weights:
            weights[copied] = weights[main]
    for prefix in STACKS:
        if prefix + "embeddings.word_embeddings.weight" in weights:
            if isinstance(config, AlbefShape):
                # Its words are all of BERT's first type, which is in the positions here.
                weights[prefix + TYPES] = torch.zeros(2, config.text.width)
            counted = torch.arange(config.text.max_positions)[None]
            weights[prefix + "embeddings.position_ids"] = counted
    torch.save({"model": {**weights, **contents.leftovers}}, directory / WEIGHTS)
    vocabulary.write_vocabulary(directory, contents.tokenizer)
    write_beside(
        directory, settings_of(config, NO_HOME), contents.extra, {}, remember(model, contents.tokenizer)
    )


def refuse(config: Config | AlbefShape, tokenizer: Any = None) -> None:
    """NoHome naming what the original code has no place for; else nothing. Without a tokenizer, the size of one tells."""
    if family_of(config).name not in ("blip", "albef"):
        raise no_blip(config)
    if isinstance(config, AlbefNlvrConfig) and config.classes != AlbefNlvrConfig().classes:
        raise NoHome(
            "an AlbefNlvr that has learned text assignment has no home in the original layout, whose class of it has "
            "other names: finetune it for statements first"
        )
    if (
        isinstance(config, AlbefNlvrConfig)
        and _doubled(alone(config.text), 2 * second_half(config.text).depth) is False
    ):
        raise NoHome(
            "an AlbefNlvr of so few layers would be read back as a classifier: keep it as capfilt saved it"
        )
    if type(config) is AlbefClassifierConfig and config.task != "entailment":
        raise NoHome(
            f"an AlbefClassifier for {config.task} has no home in the original layout: ALBEF released only that for "
            "entailment; keep it as capfilt saved it"
        )
    if not isinstance(config, AlbefShape) and blip_kind(config) == "classifier":
        raise NoHome(
            "a BlipClassifier has no home in the original layout: BLIP released none; keep it as capfilt saved it"
        )
    refuse_convolutions(config, "the original layout")
    bert = (
        config.vocab_size == vocabulary.BERT_SIZE + len(ADDED)
        if tokenizer is None
        else vocabulary.is_bert(tokenizer)
    )
    if not bert:
        raise NoHome(
            f"a vocabulary of {config.vocab_size} tokens that is not bert-base-uncased's has no home in the original "
            "layout, whose code loads BERT's and writes its ids as numbers",
            "--vocab with bert-base-uncased's vocab.txt",
        )


def _state(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    return unwrapped(path, read_pickled(path, mapped))


def _without_types(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """ALBEF's token types, of which every word has the first, put into the positions: the sum is the same."""
    found = dict(found)
    for prefix in STACKS:
        types = found.pop(prefix + TYPES, None)
        if types is not None and prefix + POSITIONS in found:
            found[prefix + POSITIONS] = found[prefix + POSITIONS].float() + types[0].float()
    return found


def _config(
    path: Path, found: dict[str, Tensor], image_size: int
) -> tuple[Config | AlbefShape, dict[str, Any]]:
    albef, encoder, decoder = STACKS
    present = [prefix for prefix in STACKS if _any(found, prefix)]
    if not present:
        raise UserError(f"{path}: neither {encoder}* nor {decoder}*: no BLIP of the original repository")
    root = present[0]
    depth = _count(found, root + "encoder.layer.")
    further: dict[str, Any] = {}
    if root == albef:
        kind = "albef"
    elif root == encoder and root + TYPES in found:
        # No BLIP has token types.
        seeing = sum(_any(found, f"{root}encoder.layer.{index}.crossattention.") for index in range(depth))
        if decoder in present:
            kind = "albef_vqa"
        elif not _any(found, "cls_head."):
            kind, further["words"] = "albef", False
        elif _doubled(depth - seeing, seeing):
            kind, depth = "albef_nlvr", depth - seeing // 2
        else:
            kind, further["task"] = "albef_classifier", "entailment"
            further["classes"] = LABELS["entailment"]
    elif root == decoder:
        kind = "captioner"
    elif len(present) == 1:
        kind = "nlvr" if _any(found, "cls_head.") else "filter"
    else:
        kind = "both" if "itm_head.weight" in found else "vqa"
    tower = "visual_encoder."
    width, patch = (_shape(path, found, tower + "patch_embed.proj.weight", 4)[i] for i in (0, 3))
    rows = _shape(path, found, tower + "pos_embed", 3)[1] - 1
    side = round(rows**0.5)
    if side * side != rows:
        raise UserError(f"{path}: {tower}pos_embed has {rows} rows besides [CLS], which is no square grid")
    vocab, text_width = _shape(path, found, root + "embeddings.word_embeddings.weight", 2)
    settings, extra = read_settings(path.parent)
    vision: dict[str, Any] = {
        "image_size": image_size or side * patch,
        "patch_size": patch,
        "width": width,
        "depth": _count(found, tower + "blocks."),
        "hidden": _shape(path, found, tower + "blocks.0.mlp.fc1.weight", 2)[0],
        "heads": _heads(path, "vision.heads", width, settings),
    }
    if (width, vision["depth"]) == (LARGE.vision.width, LARGE.vision.depth):
        vision["drop_path"] = LARGE.vision.drop_path
    text = {
        "vocab_size": vocab,
        "width": text_width,
        "depth": depth,
        "hidden": _shape(path, found, root + "encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_positions": _shape(path, found, root + "embeddings.position_embeddings.weight", 2)[0],
        "heads": _heads(path, "text.heads", text_width, settings),
    }
    values: dict[str, Any] = {"vision": vision, "text": text, **further}
    shape = _SHAPES.get(kind, BlipConfig)
    # Of a kind without one, it is a tensor too many, which is listed with the others.
    if "vision_proj.weight" in found and "embed_dim" in shape.__dataclass_fields__:
        values["embed_dim"] = found["vision_proj.weight"].shape[0]
    if kind not in _SHAPES:
        values["half"] = kind
    try:
        config = shape.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    # Where the tensors say it themselves they decide.
    rest = {k: v for k, v in settings.items() if k != "embed_dim" or kind == "captioner"}
    return with_settings(path.parent / SETTINGS, config, NO_HOME, rest), extra


def _doubled(before: int, seeing: int) -> bool:
    """Whether these numbers of layers, without and with cross-attention, are those of a model of two pictures: with one the
    second half sees (ALBEF, code: 6 and 6, and 6 and 12).
    """
    return seeing > before + 1


def _any(found: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in found)


def _shape(path: Path, found: dict[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in found or found[name].dim() != dimensions:
        raise UserError(
            f"{path}: no {name} of {dimensions} dimensions, from which the model's sizes are read"
        )
    return list(found[name].shape)


def _count(found: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in found if name.startswith(prefix)})


def _heads(path: Path, name: str, width: int, settings: dict[str, Any]) -> int:
    given = settings.get(name)
    if isinstance(given, int):
        return given
    if width % HEAD_CHANNELS:
        raise UserError(
            f"{path}: a width of {width} does not say the number of heads; put {SETTINGS} with settings {name!r} beside it"
        )
    return width // HEAD_CHANNELS
