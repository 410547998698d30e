"""ALBEF as its released code describes it, in plain torch functions over tensors by the names they have in its files."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(query, key, value, heads, causal=False):
    """One sequence [L, D] over [N, D], head by head."""
    found = []
    for q, k, v in zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True):
        scores = q @ k.T / q.shape[1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        found.append(scores.softmax(dim=1) @ v)
    return torch.cat(found, dim=1)


def picture(state, pixels, heads):
    """Tokens [N, Dv] of one picture, normalised floats [3, S, S]: timm's ViT."""
    name = "visual_encoder."
    x = F.conv2d(
        pixels[None],
        state[name + "patch_embed.proj.weight"],
        state[name + "patch_embed.proj.bias"],
        stride=state[name + "patch_embed.proj.weight"].shape[-1],
    )
    x = torch.cat([state[name + "cls_token"][0], x[0].flatten(1).T]) + state[name + "pos_embed"][0]
    for index in range(len({key.split(".")[2] for key in state if key.startswith(name + "blocks.")})):
        block = f"{name}blocks.{index}."
        qkv = linear(state, block + "attn.qkv", norm(state, block + "norm1", x, 1e-6)).chunk(3, dim=1)
        x = x + linear(state, block + "attn.proj", attend(*qkv, heads))
        hidden = F.gelu(linear(state, block + "mlp.fc1", norm(state, block + "norm2", x, 1e-6)))
        x = x + linear(state, block + "mlp.fc2", hidden)
    return norm(state, name + "norm", x, 1e-6)


def embedded(state, name, ids):
    """States [L, D] of one text's ids before the first layer; a file has token types, all of which are 0."""
    place = name + "embeddings."
    x = state[place + "word_embeddings.weight"][ids] + state[place + "position_embeddings.weight"][: len(ids)]
    if place + "token_type_embeddings.weight" in state:
        x = x + state[place + "token_type_embeddings.weight"][0]
    return norm(state, place + "LayerNorm", x, 1e-12)


def layer(state, name, x, heads, seen=None, causal=False):
    """States [L, D] after the layer `name`; `seen` [N, S] is what its cross-attention looks at."""

    def block(x, part, source, causal):
        query, key, value = (
            linear(state, f"{name}.{part}.self.{which}", each)
            for which, each in (("query", x), ("key", source), ("value", source))
        )
        out = linear(state, f"{name}.{part}.output.dense", attend(query, key, value, heads, causal))
        return norm(state, f"{name}.{part}.output.LayerNorm", out + x, 1e-12)

    x = block(x, "attention", x, causal)
    if seen is not None:
        x = block(x, "crossattention", seen, False)
    hidden = F.gelu(linear(state, f"{name}.intermediate.dense", x))
    return norm(state, f"{name}.output.LayerNorm", linear(state, f"{name}.output.dense", hidden) + x, 1e-12)


def read(state, name, ids, depth, alone, heads, pictures=()):
    """States [L, D] of one text after all layers, or with no pictures after the first `alone`, which look at none."""
    x = embedded(state, name, ids)
    for index in range(depth if pictures else alone):
        seen = pictures[(index - alone) % len(pictures)] if index >= alone else None
        x = layer(state, f"{name}encoder.layer.{index}", x, heads, seen)
    return x


def named(state, name, words, x):
    """Logits [L, V] of the language head `name` over word embeddings."""
    x = norm(state, f"{name}transform.LayerNorm", F.gelu(linear(state, f"{name}transform.dense", x)), 1e-12)
    return x @ words.T + state[f"{name}bias"]
