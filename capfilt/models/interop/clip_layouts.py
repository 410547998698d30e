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
from capfilt.models.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.weights import fill, listed

TRANSFORMERS, OPENAI = "transformers", "openai"

_BUFFERS = {
    # Numbers, not weights: positions that count 0, 1, 2, ..., the causal mask, and what OpenAI's archives say of themselves.
    TRANSFORMERS: ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    OPENAI: ("attn_mask", "input_resolution", "context_length", "vocab_size"),
}


def transformers_config(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of a CLIPModel of this shape. UserError for a ResNet, which transformers has none of."""
    v, t = config.vision, config.text
    if v.stages:
        raise UserError("transformers has no CLIP with a ResNet: export it in OpenAI's layout")
    if config.logit_bias:
        raise UserError("transformers' CLIPModel has no logit_bias: export it in OpenAI's layout")
    towers = {"hidden_act": config.activation, "layer_norm_eps": 1e-5, "projection_dim": config.embed_dim}
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


def from_transformers_config(path: Path, content: Mapping[str, Any]) -> ClipConfig:
    """The shape that a CLIPModel's `config.json` at `path` tells. UserError where it tells none that a Clip has."""
    try:
        # What it leaves out is what ViT-B/32 has, in transformers as here.
        v = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072, "hidden_act": "quick_gelu", **content.get("vision_config", {})}  # fmt: skip
        t = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
             "num_attention_heads": 8, "intermediate_size": 2048, **content.get("text_config", {})}  # fmt: skip
        if t.get("hidden_act", v["hidden_act"]) != v["hidden_act"]:
            raise UserError(f"{path}: its two towers have different activations, which no Clip has")
        return ClipConfig(
            vision=ClipVisionConfig(
                v["image_size"], v["patch_size"], v["hidden_size"], v["num_hidden_layers"], v["num_attention_heads"],
                v["intermediate_size"],
            ),
            text=ClipTextConfig(
                t["vocab_size"], t["max_position_embeddings"], t["hidden_size"], t["num_hidden_layers"],
                t["num_attention_heads"], t["intermediate_size"],
            ),
            embed_dim=content.get("projection_dim", 512),
            activation=v["hidden_act"],
        )  # fmt: skip
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of a CLIPModel ({error})") from error


def from_openai_shapes(path: Path, state: Mapping[str, Tensor], activation: str) -> ClipConfig:
    """The shape that a state in OpenAI's layout has; what shapes do not tell (heads, activation) is the published rule.

    Heads are 64 wide (CLIP, released code). activation: OpenAI's own weights are quick_gelu; the layout does not say.
    """
    try:
        text_width = state["ln_final.weight"].shape[0]
        text = ClipTextConfig(
            vocab_size=state["token_embedding.weight"].shape[0],
            context=state["positional_embedding"].shape[0],
            width=text_width,
            depth=_count(state, "transformer.resblocks."),
            heads=max(1, text_width // 64),
            hidden=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        )
        if "visual.proj" in state:
            width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
            grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
            hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
            depth = _count(state, "visual.transformer.resblocks.")
            vision = ClipVisionConfig(grid * patch, patch, width, depth, max(1, width // 64), hidden)
        else:
            stages = [_count(state, f"visual.layer{number}.") for number in range(1, 5)]
            grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
            width = state["visual.layer1.0.conv1.weight"].shape[0]
            written = "-".join(map(str, stages))
            vision = ClipVisionConfig(32 * grid, width=width, heads=max(1, 32 * width // 64), stages=written)
        return ClipConfig(vision, text, state["text_projection"].shape[1], activation, "logit_bias" in state)
    except KeyError as error:
        raise UserError(f"{path}: no CLIP in OpenAI's layout: {error.args[0]} is missing") from error


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
