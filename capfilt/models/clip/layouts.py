"""CLIP's layouts: transformers' directory of a CLIPModel, and OpenAI's file of tensors, which open_clip has too.

Written against transformers 5.23 and open_clip 3.3; nothing of theirs is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from capfilt.data.bpe import BpeTokenizer
from capfilt.errors import UserError
from capfilt.models.clip.model import Clip, ClipConfig
from capfilt.models.common.layouts.contents import NoHome, nested
from capfilt.models.common.layouts.engine import (
    CONFIG,
    ConfigTable,
    Found,
    Layout,
    Sizes,
    Vocabulary,
    geometry,
    pixels,
    refuse_trunk,
)
from capfilt.models.common.layouts.names import BARE, TRANSPOSED, Rows, under
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD
from capfilt.models.common.weights import listed

NO_HOME = ("max_text_tokens", "max_words")
TOKENIZER, MERGES = "tokenizer.json", ("merges.txt", "bpe_simple_vocab_16e6.txt")


def _find(directory: Path) -> Path:
    for name in (TOKENIZER, *MERGES):
        if (directory / name).is_file():
            return directory / name
    raise UserError(
        f"{directory}: neither {TOKENIZER} nor {' nor '.join(MERGES)}; take one from where the weights come from"
    )


def _read(directory: Path, vocab_size: int) -> BpeTokenizer:
    path = _find(directory)
    tokenizer = BpeTokenizer.open(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size} tokens, but the model has {vocab_size}")
    return tokenizer


VOCABULARY = Vocabulary(_find, _read, lambda directory, tokenizer: tokenizer.save(directory))

# ---------------------------------------------------------------------- transformers

_BLOCK = {
    "norm1": "layer_norm1", "attn.qkv": "self_attn.{q,k,v}_proj", "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
TRANSFORMERS_NAMES: Rows = (
    ("logit_scale", "logit_scale"),
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding", BARE),
    ("visual_encoder.patch_embed.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.{position_embedding.weight,position_ids?}", BARE),
    ("visual_encoder.proj.weight", "visual_projection.weight"),
    ("visual_encoder.norm_pre.*", "vision_model.pre_layrnorm.*"),  # the misspelling is theirs
    ("visual_encoder.norm.*", "vision_model.post_layernorm.*"),
    *under("visual_encoder.blocks", "vision_model.encoder.layers", _BLOCK),
    ("text_encoder.token_embed.weight", "text_model.embeddings.token_embedding.weight"),
    ("text_encoder.pos_embed", "text_model.embeddings.{position_embedding.weight,position_ids?}"),
    ("text_encoder.proj.weight", "text_projection.weight"),
    ("text_encoder.norm.*", "text_model.final_layer_norm.*"),
    *under("text_encoder.blocks", "text_model.encoder.layers", _BLOCK),
)
# What theirs means where it is left out is ViT-B/32's.
TABLE = ConfigTable(
    "CLIP", {"CLIPModel": (ClipConfig, {})},
    (
        ("embed_dim", "projection_dim", 512), ("activation", "vision_config.hidden_act", "quick_gelu"),
        ("vision.image_size", "vision_config.image_size", 224), ("vision.patch_size", "vision_config.patch_size", 32),
        *geometry("vision.", "vision_config.", 768, 12, 12, 3072),
        ("text.vocab_size", "text_config.vocab_size", 49408), ("text.context", "text_config.max_position_embeddings", 77),
        *geometry("text.", "text_config.", 512, 12, 8, 2048),
    ),
    {"vision_config.layer_norm_eps": (1e-5,), "text_config.layer_norm_eps": (1e-5,)},
    {"vision_config.attention_dropout": 0.0, "vision_config.num_channels": 3, "text_config.attention_dropout": 0.0},
)  # fmt: skip


def _from_config(path: Path, content: dict[str, Any], found: Any, settings: dict[str, Any]) -> Found:
    _, kind, values = TABLE.read(path, content)
    other = (content.get("text_config") or {}).get("hidden_act") or "quick_gelu"
    if other != values["activation"]:
        raise UserError(
            f"{path}: its two towers have different activations ({values['activation']}, {other}), which no Clip has"
        )
    return kind, values


def _config(config: ClipConfig, tokenizer: BpeTokenizer) -> dict[str, Any]:
    return nested(
        {
            **TABLE.write(config), "architectures": ["CLIPModel"], "model_type": "clip",
            "logit_scale_init_value": math.log(1 / 0.07),
            "vision_config.model_type": "clip_vision_model", "vision_config.projection_dim": config.embed_dim,
            "text_config.model_type": "clip_text_model", "text_config.projection_dim": config.embed_dim,
            "text_config.hidden_act": config.activation, "text_config.bos_token_id": config.text.start_id,
            "text_config.eos_token_id": config.text.end_id, "text_config.pad_token_id": config.text.pad_id,
        }
    )  # fmt: skip


def _transformers_files(config: ClipConfig, tokenizer: BpeTokenizer) -> dict[str, dict[str, Any]]:
    start, end = tokenizer.specials
    size = config.image_size
    return {
        CONFIG: _config(config, tokenizer),
        # CLIP, released code: the shorter side made n, then the middle; capfilt itself shows a model whole pictures.
        "preprocessor_config.json": {
            **pixels(CLIP_MEAN, CLIP_STD), "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end,
            "model_max_length": config.text.context,
        },
    }  # fmt: skip


def _refuse_transformers(config: ClipConfig, tokenizer: Any) -> None:
    refuse_trunk(config, "transformers")
    if config.vision.stages:
        raise NoHome(
            "transformers has no CLIP with a ResNet: export it in OpenAI's layout",
            "a --preset that is no ResNet",
        )
    if config.logit_bias:
        raise NoHome(
            "transformers' CLIPModel has no logit_bias: export it in OpenAI's layout", "--contrast softmax"
        )


TRANSFORMERS = Layout(
    "transformers", "CLIP", {ClipConfig: Clip}, lambda config: TRANSFORMERS_NAMES, _from_config, _transformers_files,
    VOCABULARY, NO_HOME, _refuse_transformers, model_type="clip",
)  # fmt: skip

# ---------------------------------------------------------------------- OpenAI's, and open_clip's

OPEN_CLIP = "open_clip_config.json"
HEAD_CHANNELS = 64  # CLIP, released code
SURE_WIDTH = 1024
"""Up to here every published tower has heads of HEAD_CHANNELS; open_clip's ViT-H, g and G have 80, 88 and 104."""
_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archives say of themselves, and nobody else's do."""
_MARK = "token_embedding.weight"


def _openai_names(config: ClipConfig) -> Rows:
    return (
        ("logit_*", "logit_*"),
        ("text_encoder.token_embed.weight", _MARK),
        ("text_encoder.pos_embed", "positional_embedding"),
        ("text_encoder.proj.weight", "text_projection", TRANSPOSED),
        ("text_encoder.norm.*", "ln_final.*"),
        *_resblocks("text_encoder.blocks", "transformer.resblocks"),
        *(_resnet_names(config.vision.blocks) if config.vision.stages else _VIT_NAMES),
    )


def _resblocks(ours: str, theirs: str) -> Rows:
    names = {
        "norm1": "ln_1", "attn.proj": "attn.out_proj", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"
    }  # fmt: skip
    return ((f"{ours}.*.attn.qkv.*", f"{theirs}.*.attn.in_proj_*"), *under(ours, theirs, names))


_VIT_NAMES: Rows = (
    ("visual_encoder.cls_token", "visual.class_embedding", BARE),
    ("visual_encoder.patch_embed.weight", "visual.conv1.weight"),
    ("visual_encoder.pos_embed", "visual.positional_embedding", BARE),
    ("visual_encoder.proj.weight", "visual.proj", TRANSPOSED),
    ("visual_encoder.norm_pre.*", "visual.ln_pre.*"),
    ("visual_encoder.norm.*", "visual.ln_post.*"),
    *_resblocks("visual_encoder.blocks", "visual.transformer.resblocks"),
)


def _resnet_names(stages: tuple[int, ...]) -> Rows:
    pool = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "proj": "c_proj"}
    places = [(stage, place) for stage, count in enumerate(stages, 1) for place in range(count)]
    blocks = [
        (f"visual_encoder.blocks.{index}", f"visual.layer{stage}.{place}")
        for index, (stage, place) in enumerate(places)
    ]
    return (
        ("visual_encoder.pos_embed", "visual.attnpool.positional_embedding", BARE),
        *((f"visual_encoder.pool.{ours}.*", f"visual.attnpool.{theirs}.*") for ours, theirs in pool.items()),
        *((f"visual_encoder.stem.{3 * number}.*", f"visual.conv{number + 1}.*") for number in range(3)),
        *((f"visual_encoder.stem.{3 * number + 1}.*", f"visual.bn{number + 1}.*") for number in range(3)),
        *(
            (f"{ours}.skip.{n}.*", f"{theirs}.downsample.{n - 1}.*")
            for ours, theirs in blocks
            for n in (1, 2)
        ),
        *((f"{ours}.**", f"{theirs}.**") for ours, theirs in blocks),
    )


# open_clip, code: what its `model_cfg` says, and which other options of its towers a Clip can have.
_KNOWN = {
    "model_cfg": "embed_dim vision_cfg text_cfg quick_gelu init_logit_scale init_logit_bias output_dict",
    "vision_cfg": "image_size layers width head_width mlp_ratio patch_size patch_dropout output_tokens",
    "text_cfg": "context_length vocab_size width heads layers mlp_ratio hf_tokenizer_name tokenizer_mode "
    "tokenizer_kwargs output_tokens eos_id",
}
_ONLY = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",), "pad_id": (0,),
         "block_type": ("default",)}  # fmt: skip
_TEXT_SIZES = {
    "embed_dim": ("text_projection", 1),
    "text.vocab_size": (_MARK, 0),
    "text.context": ("positional_embedding", 0),
    "text.width": ("ln_final.weight", 0),
    "text.hidden": ("transformer.resblocks.0.mlp.c_fc.weight", 0),
}
_VIT_SIZES = {
    "vision.width": ("visual.conv1.weight", 0),
    "vision.patch_size": ("visual.conv1.weight", 3),
    "vision.hidden": ("visual.transformer.resblocks.0.mlp.c_fc.weight", 0),
}


def _from_tensors(
    path: Path, content: dict[str, Any] | None, found: Mapping[str, Tensor] | None, settings: dict[str, Any]
) -> Found:
    """What shapes do not tell is what open_clip's `model_cfg` says.

    Without it, heads are 64 wide, up to a width of 1024 (CLIP, released code; open_clip's wider towers have others), and the
    activation is quick_gelu, of OpenAI's own weights alone, which are told by the three numbers that its archives hold.
    """
    tensors = Sizes(path, found or {})
    cfg = _model_cfg(path, content)
    if cfg is None and not set(_NUMBERS) <= set(tensors.found):
        raise UserError(
            f"{path}: a CLIP's tensors do not say its activation; put {OPEN_CLIP} beside it, as in "
            '{"model_cfg": {"quick_gelu": false}}'
        )
    vision, text = (dict((cfg or {}).get(name) or {}) for name in ("vision_cfg", "text_cfg"))
    values = tensors.table(_TEXT_SIZES)

    def heads(width: int, name: str) -> int:
        return tensors.heads(
            width, HEAD_CHANNELS, SURE_WIDTH, f"{OPEN_CLIP} beside it, with model_cfg.{name}"
        )

    # Where there is a table of a tower, open_clip's default fills it up.
    head_width = int(vision.get("head_width", HEAD_CHANNELS)) if vision else 0
    values["text.depth"] = tensors.count("transformer.resblocks.")
    values["text.heads"] = (
        int(text.get("heads", 8)) if text else heads(values["text.width"], "text_cfg.heads")
    )
    if "visual.proj" in tensors.found:
        values |= tensors.table(_VIT_SIZES)
        width = values["vision.width"]
        values["vision.depth"] = tensors.count("visual.transformer.resblocks.")
        values["vision.heads"] = width // head_width if head_width else heads(width, "vision_cfg.head_width")
        side = tensors.grid("visual.positional_embedding", 0)
        values["vision.image_size"] = side * values["vision.patch_size"]
    else:
        width = tensors.size("visual.layer1.0.conv1.weight", 0)
        stages = "-".join(str(tensors.count(f"visual.layer{number}.")) for number in range(1, 5))
        # Every published ResNet's pool has heads of 64, whatever its width.
        values |= {
            "vision.width": width, "vision.heads": max(1, 32 * width // (head_width or HEAD_CHANNELS)),
            "vision.stages": stages, "vision.image_size": 32 * tensors.grid("visual.attnpool.positional_embedding", 0),
        }  # fmt: skip
    values["activation"] = "quick_gelu" if cfg is None or cfg.get("quick_gelu") else "gelu"
    return ClipConfig, {**values, "logit_bias": "logit_bias" in tensors.found}


def _model_cfg(path: Path, content: dict[str, Any] | None) -> dict[str, Any] | None:
    """The table of open_clip_config.json, None without the file; UserError for a model that no Clip is."""
    if content is None:
        return None
    place = path.parent / OPEN_CLIP
    cfg = content.get("model_cfg")
    if not isinstance(cfg, dict):
        raise UserError(f"{place}: the table 'model_cfg' is missing")
    shown = content.get("preprocess_cfg") or {}
    for name, ours in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
        if tuple(shown.get(name) or ours) != ours:
            raise UserError(f"{place}: pictures are normalised by another {name} than CLIP's {list(ours)}")
    for name, known in _KNOWN.items():
        said = dict(cfg if name == "model_cfg" else cfg.get(name) or {})
        wrong = [
            f"{key} {value!r}"
            for key, value in said.items()
            if key not in known.split() and value and value not in _ONLY.get(key, ())
        ]
        if wrong:
            raise UserError(f"{place}: {name} says {listed(wrong)}, which no Clip has")
    return cfg


def _openai_files(config: ClipConfig, tokenizer: BpeTokenizer) -> dict[str, dict[str, Any]]:
    v, t = config.vision, config.text
    cfg = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": v.image_size, "layers": list(v.blocks) if v.stages else v.depth, "width": v.width,
            "head_width": (32 * v.width if v.stages else v.width) // v.heads,
            "patch_size": None if v.stages else v.patch_size, "mlp_ratio": _ratio(v.hidden, v.width),
        },
        "text_cfg": {
            "context_length": t.context, "vocab_size": t.vocab_size, "width": t.width, "heads": t.heads,
            "layers": t.depth, "mlp_ratio": _ratio(t.hidden, t.width),
        },
        **({"quick_gelu": True} if config.activation == "quick_gelu" else {}),
        **({"init_logit_bias": -10.0} if config.logit_bias else {}),
    }  # fmt: skip
    return {OPEN_CLIP: {"model_cfg": cfg, "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}}}


def _ratio(hidden: int, width: int) -> float:
    """What open_clip multiplies the width by, and rounds down."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


OPENAI = Layout(
    "openai", "CLIP", {ClipConfig: Clip}, _openai_names, _from_tensors, _openai_files, VOCABULARY, NO_HOME,
    lambda config, tokenizer: refuse_trunk(config, "OpenAI's layout"),
    config=OPEN_CLIP, weights="open_clip_model.safetensors", suffixes=(".safetensors", ".bin", ".pt", ".pth"),
    files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"), holds=lambda found: _MARK in found,
    ignored=("attn_mask", *_NUMBERS),
)  # fmt: skip

LAYOUTS = (TRANSFORMERS, OPENAI)
