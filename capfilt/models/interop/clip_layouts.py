"""CLIP's weights in two other layouts: transformers' CLIPModel, and OpenAI's own, which open_clip has too.

Every key has its place or is an error that lists it. Reading and writing files is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import UserError
from capfilt.models.clip.model import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.common.weights import fill, listed
from capfilt.models.interop.contents import NoHome, refuse_trunk

TRANSFORMERS, OPENAI = "transformers", "openai"

HEAD_CHANNELS = 64  # CLIP, released code
SURE_WIDTH = 1024
"""Up to here every published tower has heads of HEAD_CHANNELS; open_clip's ViT-H, g and G have 80, 88 and 104."""
EPS = 1e-5  # of every LayerNorm
_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archives say of themselves, and nobody else's do."""

_BUFFERS = {
    # Numbers, not weights: positions that count 0, 1, 2, ..., the causal mask.
    TRANSFORMERS: ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    OPENAI: ("attn_mask", *_NUMBERS),
}


def transformers_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of a CLIPModel of this shape. UserError for a ResNet, which transformers has none of."""
    v, t = config.vision, config.text
    if v.stages:
        raise NoHome(
            "transformers has no CLIP with a ResNet: export it in OpenAI's layout",
            "a --preset that is no ResNet",
        )
    if config.logit_bias:
        raise NoHome(
            "transformers' CLIPModel has no logit_bias: export it in OpenAI's layout", "--contrast softmax"
        )
    towers = {"hidden_act": config.activation, "layer_norm_eps": EPS, "projection_dim": config.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(1 / 0.07),
        "vision_config": {
            **towers, "model_type": "clip_vision_model", "image_size": v.image_size, "patch_size": v.patch_size,
            "hidden_size": v.width, "num_hidden_layers": v.depth, "num_attention_heads": v.heads,
            "intermediate_size": v.hidden,
        },
        "text_config": {
            **towers, "model_type": "clip_text_model", "vocab_size": t.vocab_size, "max_position_embeddings": t.context,
            "hidden_size": t.width, "num_hidden_layers": t.depth, "num_attention_heads": t.heads,
            "intermediate_size": t.hidden, "bos_token_id": t.start_id, "eos_token_id": t.end_id, "pad_token_id": t.pad_id,
        },
    }  # fmt: skip


# What a key means that a config.json leaves out: transformers' class defaults, which are ViT-B/32's.
_SAID: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": EPS, "attention_dropout": 0.0}
_VISION: dict[str, Any] = {
    **_SAID, "image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "num_channels": 3,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    **_SAID, "vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "intermediate_size": 2048,
}  # fmt: skip
_FIXED = {"layer_norm_eps": EPS, "attention_dropout": 0.0, "num_channels": 3}


def from_transformers_config(path: Path, content: Mapping[str, Any]) -> ClipConfig:
    """The shape that a CLIPModel's `config.json` at `path` tells. UserError where it tells none that a Clip has."""
    try:
        v, t = ({**known, **{name: each for name, each in content.get(side, {}).items() if each is not None}}
                for side, known in (("vision_config", _VISION), ("text_config", _TEXT)))  # fmt: skip
        wrong = [
            f"{name} {said[name]!r} (only {only!r})"
            for said in (v, t)
            for name, only in _FIXED.items()
            if said.get(name, only) != only
        ]
        if wrong:
            raise UserError(f"{path}: capfilt's CLIP has no {listed(wrong)}")
        if t["hidden_act"] != v["hidden_act"]:
            raise UserError(
                f"{path}: its two towers have different activations ({v['hidden_act']}, {t['hidden_act']}), which no "
                "Clip has"
            )
        values = {
            "vision": {"image_size": v["image_size"], "patch_size": v["patch_size"], **_sizes(v)},
            "text": {"vocab_size": t["vocab_size"], "context": t["max_position_embeddings"], **_sizes(t)},
            "embed_dim": content.get("projection_dim", 512),
            "activation": v["hidden_act"],
        }
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of a CLIPModel ({error})") from error
    try:
        return ClipConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sizes(said: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
    }
    return {ours: said[theirs] for ours, theirs in names.items()}


# open_clip, code: what its `model_cfg` says, and what other options of its towers are where a Clip can be them.
_CFG = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "output_dict",
)
_VISION_CFG = (
    "image_size",
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "patch_dropout",
    "output_tokens",
)
_TEXT_CFG = (
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name", "tokenizer_mode",
    "tokenizer_kwargs", "output_tokens", "eos_id",
)  # fmt: skip
_ONLY = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",), "pad_id": (0,),
         "block_type": ("default",)}  # fmt: skip


def from_openai_shapes(path: Path, state: Mapping[str, Tensor], said: Mapping[str, Any] | None) -> ClipConfig:
    """The shape that a state in OpenAI's layout has; what shapes do not tell is what open_clip's `model_cfg` says.

    said: that; None where there is none. Then heads are 64 wide, up to a width of 1024 (CLIP, released code; open_clip's
    wider towers have others), and the activation is quick_gelu, of OpenAI's own weights alone, which are told by the three
    numbers that its archives hold. UserError where that leaves something open, or `said` is no Clip.
    """
    cfg = dict(said or {})
    sides = {name: dict(cfg.get(name) or {}) for name in ("vision_cfg", "text_cfg")}
    if said is None and not set(_NUMBERS) <= set(state):
        raise UserError(
            f"{path}: a CLIP's tensors do not say its activation; put open_clip_config.json beside it, as in "
            '{"model_cfg": {"quick_gelu": false}}'
        )
    for name, found, known in (
        ("model_cfg", cfg, _CFG),
        ("model_cfg.vision_cfg", sides["vision_cfg"], _VISION_CFG),
        ("model_cfg.text_cfg", sides["text_cfg"], _TEXT_CFG),
    ):
        wrong = [
            f"{key} {value!r}"
            for key, value in found.items()
            if key not in known and value and value not in _ONLY.get(key, ())
        ]
        if wrong:
            raise UserError(
                f"{path}: {name} of open_clip_config.json says {listed(wrong)}, which no Clip has"
            )
    try:
        text_width = state["ln_final.weight"].shape[0]
        text = ClipTextConfig(
            vocab_size=state["token_embedding.weight"].shape[0],
            context=state["positional_embedding"].shape[0],
            width=text_width,
            depth=_count(state, "transformer.resblocks."),
            heads=_given(sides["text_cfg"], "heads", 8) or _heads(path, "text_cfg.heads", text_width),
            hidden=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        )
        head_width = _given(sides["vision_cfg"], "head_width", HEAD_CHANNELS)
        if "visual.proj" in state:
            width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
            grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
            hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
            depth = _count(state, "visual.transformer.resblocks.")
            heads = width // head_width if head_width else _heads(path, "vision_cfg.head_width", width)
            vision = ClipVisionConfig(grid * patch, patch, width, depth, heads, hidden)
        else:
            stages = [_count(state, f"visual.layer{number}.") for number in range(1, 5)]
            grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
            width = state["visual.layer1.0.conv1.weight"].shape[0]
            written = "-".join(map(str, stages))
            # Every published ResNet's pool has heads of 64, whatever its width.
            heads = 32 * width // (head_width or HEAD_CHANNELS)
            vision = ClipVisionConfig(32 * grid, width=width, heads=max(1, heads), stages=written)
        activation = "quick_gelu" if said is None or cfg.get("quick_gelu") else "gelu"
        return ClipConfig(vision, text, state["text_projection"].shape[1], activation, "logit_bias" in state)
    except KeyError as error:
        raise UserError(f"{path}: no CLIP in OpenAI's layout: {error.args[0]} is missing") from error
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: open_clip_config.json does not fit its tensors ({error})") from error


def openai_cfg(config: ClipConfig) -> dict[str, Any]:
    """What open_clip's `model_cfg` says of this shape."""
    v, t = config.vision, config.text
    wide = 32 * v.width if v.stages else v.width
    vision = {
        "image_size": v.image_size, "layers": list(v.blocks) if v.stages else v.depth, "width": v.width,
        "head_width": wide // v.heads, "patch_size": None if v.stages else v.patch_size,
        "mlp_ratio": _ratio(v.hidden, v.width),
    }  # fmt: skip
    text = {
        "context_length": t.context, "vocab_size": t.vocab_size, "width": t.width, "heads": t.heads, "layers": t.depth,
        "mlp_ratio": _ratio(t.hidden, t.width),
    }  # fmt: skip
    made = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if config.activation == "quick_gelu":
        made["quick_gelu"] = True
    return {**made, "init_logit_bias": -10.0} if config.logit_bias else made


def _given(table: Mapping[str, Any], name: str, default: int) -> int:
    """What a table of open_clip's says, or open_clip's default; 0 where there is no table."""
    return int(table.get(name, default)) if table else 0


def _ratio(hidden: int, width: int) -> float:
    """What open_clip multiplies the width by, and rounds down."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def _heads(path: Path, name: str, width: int) -> int:
    if width % HEAD_CHANNELS or width > SURE_WIDTH:
        raise UserError(
            f"{path}: a width of {width} does not say the number of heads; put open_clip_config.json beside it, with "
            f"model_cfg.{name}"
        )
    return width // HEAD_CHANNELS


def filled(path: Path, config: ClipConfig, layout: str, found: Mapping[str, Tensor]) -> Clip:
    """A Clip of `config` in evaluation mode with the weights of a state in this layout, in fp32.

    UserError lists tensors that are missing, that no Clip has, or of another shape.
    """
    with torch.device("meta"):
        model = Clip(config)
    rest = {name: each for name, each in found.items() if name not in _BUFFERS[layout]}
    state: dict[str, Tensor] = {}
    missing = []
    for ours, theirs in _names(config, layout).items():
        lacking = [name for name in theirs if name not in rest]
        if lacking:
            missing += lacking
            continue
        state[ours] = _read(ours, [rest.pop(name) for name in theirs], layout, model)
    if missing or rest:
        faults = [f"{len(names)} tensors {kind}: {listed(sorted(names))}"
                  for kind, names in (("missing", missing), ("that no CLIP has", list(rest))) if names]  # fmt: skip
        raise UserError(f"{path}: {'; '.join(faults)}")
    fill(path, model, state)
    model.visual_encoder.set_normalisation()
    return model.eval()


def exported(model: Clip, layout: str) -> dict[str, Tensor]:
    """The weights in another layout: the inverse of `filled`."""
    refuse_trunk(model.config, layout)
    if layout == TRANSFORMERS:
        transformers_config(model.config)
    made: dict[str, Tensor] = {}
    own = model.state_dict()
    for ours, theirs in _names(model.config, layout).items():
        tensors = _written(ours, own[ours], len(theirs), layout)
        made |= {name: each.contiguous() for name, each in zip(theirs, tensors, strict=True)}
    return made


def _read(ours: str, tensors: list[Tensor], layout: str, model: Clip) -> Tensor:
    tensor = (
        torch.cat([each.float() if each.is_floating_point() else each for each in tensors])
        if len(tensors) > 1
        else tensors[0]
    )
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if layout == OPENAI and ours in _TRANSPOSED:
        tensor = tensor.T.contiguous()
    wanted = model.state_dict()[ours]
    # A token and positions lie without the batch's dimension there.
    return (
        tensor.view(wanted.shape)
        if tensor.numel() == wanted.numel() and tensor.dim() < wanted.dim()
        else tensor
    )


def _written(ours: str, tensor: Tensor, parts: int, layout: str) -> list[Tensor]:
    if layout == OPENAI and ours in _TRANSPOSED:
        tensor = tensor.T
    if ours == "visual_encoder.cls_token":
        tensor = tensor.view(-1)
    elif ours == "visual_encoder.pos_embed":
        tensor = tensor[0]
    return list(tensor.chunk(parts)) if parts > 1 else [tensor]


_TRANSPOSED = ("text_encoder.proj.weight", "visual_encoder.proj.weight")
"""OpenAI multiplies by these from the right."""


def _names(config: ClipConfig, layout: str) -> dict[str, list[str]]:
    """Our names -> theirs; several where ours is their concatenation."""
    return _transformers_names(config) if layout == TRANSFORMERS else _openai_names(config)


def _both(ours: str, *theirs: str) -> dict[str, list[str]]:
    return {f"{ours}.{kind}": [f"{each}.{kind}" for each in theirs] for kind in ("weight", "bias")}


def _transformers_names(config: ClipConfig) -> dict[str, list[str]]:
    names = {
        "logit_scale": ["logit_scale"],
        "visual_encoder.cls_token": ["vision_model.embeddings.class_embedding"],
        "visual_encoder.patch_embed.weight": ["vision_model.embeddings.patch_embedding.weight"],
        "visual_encoder.pos_embed": ["vision_model.embeddings.position_embedding.weight"],
        "visual_encoder.proj.weight": ["visual_projection.weight"],
        "text_encoder.token_embed.weight": ["text_model.embeddings.token_embedding.weight"],
        "text_encoder.pos_embed": ["text_model.embeddings.position_embedding.weight"],
        "text_encoder.proj.weight": ["text_projection.weight"],
        # The misspelling is theirs.
        **_both("visual_encoder.norm_pre", "vision_model.pre_layrnorm"),
        **_both("visual_encoder.norm", "vision_model.post_layernorm"),
        **_both("text_encoder.norm", "text_model.final_layer_norm"),
    }
    for ours, theirs, depth in (
        ("visual_encoder", "vision_model", config.vision.depth),
        ("text_encoder", "text_model", config.text.depth),
    ):
        for index in range(depth):
            block, layer = f"{ours}.blocks.{index}", f"{theirs}.encoder.layers.{index}"
            names |= _both(f"{block}.norm1", f"{layer}.layer_norm1")
            names |= _both(f"{block}.attn.qkv", *(f"{layer}.self_attn.{each}_proj" for each in "qkv"))
            names |= _both(f"{block}.attn.proj", f"{layer}.self_attn.out_proj")
            names |= _both(f"{block}.norm2", f"{layer}.layer_norm2")
            names |= _both(f"{block}.mlp.fc1", f"{layer}.mlp.fc1") | _both(
                f"{block}.mlp.fc2", f"{layer}.mlp.fc2"
            )
    return names


def _openai_names(config: ClipConfig) -> dict[str, list[str]]:
    names = {
        "logit_scale": ["logit_scale"],
        "text_encoder.token_embed.weight": ["token_embedding.weight"],
        "text_encoder.pos_embed": ["positional_embedding"],
        "text_encoder.proj.weight": ["text_projection"],
        **_both("text_encoder.norm", "ln_final"),
        **_openai_blocks("text_encoder", "transformer", config.text.depth),
    }
    if config.logit_bias:
        names["logit_bias"] = ["logit_bias"]
    if not config.vision.stages:
        return names | {
            "visual_encoder.cls_token": ["visual.class_embedding"],
            "visual_encoder.patch_embed.weight": ["visual.conv1.weight"],
            "visual_encoder.pos_embed": ["visual.positional_embedding"],
            "visual_encoder.proj.weight": ["visual.proj"],
            **_both("visual_encoder.norm_pre", "visual.ln_pre"),
            **_both("visual_encoder.norm", "visual.ln_post"),
            **_openai_blocks("visual_encoder", "visual.transformer", config.vision.depth),
        }
    names |= {"visual_encoder.pos_embed": ["visual.attnpool.positional_embedding"]}
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("proj", "c_proj")):
        names |= _both(f"visual_encoder.pool.{ours}", f"visual.attnpool.{theirs}")
    for number in range(3):
        names |= _convolved(
            f"visual_encoder.stem.{3 * number}", f"visual_encoder.stem.{3 * number + 1}",
            f"visual.conv{number + 1}", f"visual.bn{number + 1}",
        )  # fmt: skip
    index = 0
    into = config.vision.width
    for stage, count in enumerate(config.vision.blocks):
        out = 4 * (config.vision.width << stage)
        for place in range(count):
            block, layer = f"visual_encoder.blocks.{index}", f"visual.layer{stage + 1}.{place}"
            for number in (1, 2, 3):
                names |= _convolved(
                    f"{block}.conv{number}",
                    f"{block}.bn{number}",
                    f"{layer}.conv{number}",
                    f"{layer}.bn{number}",
                )
            if not place and (stage or into != out):
                names |= _convolved(
                    f"{block}.skip.1", f"{block}.skip.2", f"{layer}.downsample.0", f"{layer}.downsample.1"
                )
            index, into = index + 1, out
    return names


def _openai_blocks(ours: str, theirs: str, depth: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for index in range(depth):
        block, layer = f"{ours}.blocks.{index}", f"{theirs}.resblocks.{index}"
        names |= {
            f"{block}.attn.qkv.weight": [f"{layer}.attn.in_proj_weight"],
            f"{block}.attn.qkv.bias": [f"{layer}.attn.in_proj_bias"],
            **_both(f"{block}.norm1", f"{layer}.ln_1"),
            **_both(f"{block}.attn.proj", f"{layer}.attn.out_proj"),
            **_both(f"{block}.norm2", f"{layer}.ln_2"),
            **_both(f"{block}.mlp.fc1", f"{layer}.mlp.c_fc"),
            **_both(f"{block}.mlp.fc2", f"{layer}.mlp.c_proj"),
        }
    return names


def _convolved(conv: str, norm: str, their_conv: str, their_norm: str) -> dict[str, list[str]]:
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {
        f"{conv}.weight": [f"{their_conv}.weight"],
        **{f"{norm}.{kind}": [f"{their_norm}.{kind}"] for kind in kinds},
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules follow the prefix."""
    found = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    return len(found)
