"""Catches a CLIP that is nobody's: other shapes, another reading of a text, weights that change on their way in or out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capfilt.data.bpe import BpeTokenizer
from capfilt.models import build, checkpoint, preset
from capfilt.models.clip.layouts import OPENAI, TRANSFORMERS
from capfilt.models.clip.model import PRESETS as CLIP
from capfilt.models.clip.model import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.layouts.contents import assemble, nested
from capfilt.models.export import export, places
from tests.models.interop.clips import RESNET, VIT, sharpened, texts
from tests.refusals import refused

HERE = Path("clip.safetensors")


def given(model, layout):
    """The model's tensors under the layout's names."""
    return layout.given(model.config, model.state_dict())


def filled(config, layout, state):
    """The model that is read from tensors under the layout's names."""
    model = layout.blank(config)
    return assemble(HERE, model, layout.taken(HERE, model, state)[0])


def from_config(content):
    """The config that a CLIPModel's config.json tells."""
    kind, values = TRANSFORMERS.shape(HERE, content, None, {})
    return kind.from_dict(nested(values))


def test_the_published_sizes():
    # CLIP, released models: 151.3M for ViT-B/32, 102.0M for RN50, 427.6M for ViT-L/14.
    with torch.device("meta"):
        rn50 = ClipConfig(ClipVisionConfig(width=64, heads=32, stages="3-4-6-3"), embed_dim=1024)
        counts = [
            sum(p.numel() for p in Clip(each).parameters()) for each in (CLIP["base"], rn50, CLIP["large"])
        ]
    assert counts == [151277313, 102007137, 427616513]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: each.clone()
        for name, each in model.state_dict().items()
        if ".running_" in f".{name}" or "num_b" in name
    }


def backwards(model: Clip) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    features = model.encode_image(pixels)
    if features.requires_grad:
        (features * torch.arange(24.0)).sum().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def test_a_frozen_resnet_keeps_its_statistics_too():
    """A tower frozen by its weights alone, whose answers drift all the same: batch normalisation follows the batches."""
    model = sharpened(RESNET)
    pixels = torch.randn(4, 3, 64, 64)
    before, expected = statistics(model), model.encode_image(pixels)
    assert before
    model.visual_encoder.requires_grad_(False)
    model.train()
    torch.testing.assert_close(model.encode_image(pixels), expected)
    assert all(torch.equal(each, before[name]) for name, each in statistics(model).items())
    model.visual_encoder.requires_grad_(True)
    backwards(model)
    assert not any(torch.equal(each, before[name]) for name, each in statistics(model).items())


def test_recomputed_activations_move_statistics_once():
    """Statistics that move twice a step, once more in the backward pass, and so forget twice as fast."""
    kept, again = sharpened(RESNET), sharpened(RESNET)
    recompute_activations(again)
    expected, found = backwards(kept), backwards(again)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], msg=name)
    for name, each in statistics(again).items():
        torch.testing.assert_close(each, statistics(kept)[name], msg=name)
    backwards(again)
    # The next step's move again.
    assert statistics(again)["visual_encoder.blocks.0.bn1.num_batches_tracked"] == 2


def test_every_preset_can_be_built_and_written_down():
    for name in CLIP:
        config = preset("clip", name, 1000)
        assert ClipConfig.from_dict(config.to_dict()) == config
        with torch.device("meta"):
            assert Clip(config).config.vocab_size == 1000
    with refused("huge", "clip"):
        preset("clip", "huge", 1000)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_weights_give_transformers_vectors(activation):
    transformers = pytest.importorskip("transformers")
    mine = sharpened(dataclasses.replace(VIT, activation=activation))

    class Specials:
        specials = ("<s>", "</s>")

    content = TRANSFORMERS.said(mine.config, Specials)["config.json"]
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            **{name: content[name] for name in ("vision_config", "text_config", "projection_dim")}
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(given(mine, TRANSFORMERS), strict=False)
    assert all("position_ids" in name for name in missing)
    assert not unexpected
    pixels, ids = torch.randn(3, 3, 32, 32), texts(mine.config)
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(
            mine.embed_image(mine.encode_image(pixels)), found.image_embeds, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(mine.embed_text(ids), found.text_embeds, atol=1e-5, rtol=1e-5)
    config = from_config(theirs.config.to_dict())
    assert config == mine.config
    back = filled(config, TRANSFORMERS, theirs.state_dict())
    for name, tensor in mine.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def openai_vit(state: dict, heads: int, pixels: torch.Tensor) -> torch.Tensor:
    """OpenAI's ViT by its names, layer by layer with torch's own attention."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=state["visual.conv1.weight"].shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        + state["visual.positional_embedding"]
    )
    x = normed(x, state, "visual.ln_pre")
    x = blocks(x, state, "visual.transformer.resblocks", heads, None)
    return normed(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]


def openai_text(state: dict, heads: int, ids: torch.Tensor) -> torch.Tensor:
    length = ids.shape[1]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][:length]
    causal = torch.full((length, length), float("-inf")).triu(1)
    x = normed(blocks(x, state, "transformer.resblocks", heads, causal), state, "ln_final")
    # Its end token has the largest id, so argmax finds the first.
    return x[torch.arange(len(x)), ids.argmax(1)] @ state["text_projection"]


def blocks(x, state, prefix, heads, mask):
    for index in range(2):
        at = f"{prefix}.{index}"
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        attention.load_state_dict(
            {
                name.removeprefix(f"{at}.attn."): each
                for name, each in state.items()
                if name.startswith(f"{at}.attn.")
            }
        )
        y = normed(x, state, f"{at}.ln_1")
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = normed(x, state, f"{at}.ln_2")
        y = F.linear(y, state[f"{at}.mlp.c_fc.weight"], state[f"{at}.mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, state[f"{at}.mlp.c_proj.weight"], state[f"{at}.mlp.c_proj.bias"])
    return x


def normed(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def openai_resnet(state: dict, heads: int, pixels: torch.Tensor) -> torch.Tensor:
    """OpenAI's ResNet by its names."""

    def conv(x, name, norm, stride=1):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{norm}.{kind}"] for kind in kinds))

    x = pixels
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = conv(x, f"visual.conv{number}", f"visual.bn{number}", stride).relu()
    x = F.avg_pool2d(x, 2)
    for stage, count in enumerate((1, 2, 1, 1), start=1):
        for place in range(count):
            at, stride = f"visual.layer{stage}.{place}", 2 if stage > 1 and not place else 1
            y = conv(x, f"{at}.conv1", f"{at}.bn1").relu()
            y = F.avg_pool2d(conv(y, f"{at}.conv2", f"{at}.bn2").relu(), stride)
            y = conv(y, f"{at}.conv3", f"{at}.bn3")
            if f"{at}.downsample.0.weight" in state:
                x = conv(F.avg_pool2d(x, stride), f"{at}.downsample.0", f"{at}.downsample.1")
            x = (x + y).relu()
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + state["visual.attnpool.positional_embedding"][:, None]
    pool = {name.removeprefix("visual.attnpool."): each for name, each in state.items() if "attnpool" in name}
    out, _ = F.multi_head_attention_forward(
        x[:1], x, x, x.shape[-1], heads, None,
        torch.cat([pool[f"{each}_proj.bias"] for each in "qkv"]), None, None, False, 0.0,
        pool["c_proj.weight"], pool["c_proj.bias"], training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=pool["q_proj.weight"], k_proj_weight=pool["k_proj.weight"], v_proj_weight=pool["v_proj.weight"],
    )  # fmt: skip
    return out[0]


@pytest.mark.parametrize(("config", "tower", "heads"), [(VIT, openai_vit, 2), (RESNET, openai_resnet, 8)])
def test_openais_layout_computed_by_its_own_names(config, tower, heads):
    mine = sharpened(config)
    state = given(mine, OPENAI)
    pixels, ids = torch.randn(3, 3, config.image_size, config.image_size), texts(config)
    with torch.no_grad():
        torch.testing.assert_close(
            mine.encode_image(pixels), tower(state, heads, pixels), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(mine.encode_text(ids), openai_text(state, 1, ids), atol=1e-4, rtol=1e-4)
    if config is VIT:
        # The buffers of OpenAI's archives, and half precision, as they come.
        state = {name: each.half() if each.is_floating_point() else each for name, each in state.items()}
    state |= {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    found = OPENAI.told(HERE, state)[0]
    back = filled(found, OPENAI, state)
    with torch.no_grad():
        torch.testing.assert_close(back.encode_image(pixels), mine.encode_image(pixels), atol=0.02, rtol=0.02)
    assert found.vision.stages == config.vision.stages


def test_what_their_config_leaves_out_is_their_default_and_what_no_clip_has_is_refused():
    assert from_config({}) == ClipConfig()
    # A tower that says no activation has transformers' default, not the other tower's.
    with refused("gelu, quick_gelu"):
        from_config({"vision_config": {"hidden_act": "gelu"}})
    for side in ("vision_config", "text_config"):
        with refused(f"{side}.layer_norm_eps", 1e-06):
            from_config({side: {"layer_norm_eps": 1e-6}})
        assert from_config({side: {"layer_norm_eps": 1e-5, "hidden_act": None}}) == ClipConfig()


def test_keys_without_a_place_and_places_without_a_key_are_listed():
    state = given(sharpened(VIT), OPENAI)
    state["visual.extra"] = torch.zeros(1)
    del state["ln_final.bias"]
    with refused("missing", "ln_final.bias", "visual.extra"):
        filled(VIT, OPENAI, state)
    del state["ln_final.weight"]
    with refused("ln_final.weight"):
        OPENAI.told(HERE, {**state, "input_resolution": 1, "context_length": 1, "vocab_size": 1})
    for lacking in (RESNET, dataclasses.replace(VIT, logit_bias=True)):
        assert "OpenAI's layout" in str(places(lacking)["transformers"])
    biased = build(dataclasses.replace(VIT, logit_bias=True))
    assert OPENAI.shape(HERE, {"model_cfg": {}}, given(biased, OPENAI), {})[1]["logit_bias"]


def test_pixels_are_normalised_and_positions_resized():
    model = sharpened(VIT)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = (pixels.float() / 255 - model.visual_encoder.mean) / model.visual_encoder.std
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), model.encode_image(floats))
        model.resize_image(64)
        assert model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 24)
    with refused("17 tokens", 16):
        model.embed_text(torch.zeros(1, 17, dtype=torch.int64))


def test_a_transformers_directory_opens_and_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = BpeTokenizer.train(["a photo of a dog", "a dog on a beach"] * 3, 530)
    text = dataclasses.replace(VIT.text, vocab_size=tokenizer.vocab_size)
    mine = sharpened(dataclasses.replace(VIT, text=text))
    checkpoint.save(tmp_path / "ours", mine, tokenizer, {"note": "kept"})
    said = export(tmp_path / "ours", "transformers", tmp_path / "theirs")
    assert "clip" in said[0]
    model = transformers.CLIPModel.from_pretrained(tmp_path / "theirs").eval()
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    texts = ["a photo of a dog", "a cat"]
    ids = [reader(each)["input_ids"] for each in texts]
    assert ids == tokenizer.encode_ragged(texts)
    pixels = torch.randn(2, 3, 32, 32)
    padded, _ = tokenizer.pad(ids)
    with torch.no_grad():
        found = model(input_ids=padded, pixel_values=pixels)
        torch.testing.assert_close(mine.embed_text(padded), found.text_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            mine.embed_image(mine.encode_image(pixels)), found.image_embeds, atol=1e-5, rtol=1e-5
        )
    model.save_pretrained(tmp_path / "saved")
    reader.save_pretrained(tmp_path / "saved")
    for name in ("theirs", "saved"):
        contents, meta = checkpoint.open_any(tmp_path / name)
        assert meta["layout"] == "transformers"
        assert contents.tokenizer.fingerprint == tokenizer.fingerprint
        for key, tensor in mine.state_dict().items():
            assert torch.equal(contents.model.state_dict()[key], tensor), key
    assert checkpoint.open_any(tmp_path / "theirs")[0].extra == {"note": "kept"}
    assert checkpoint.fingerprint(tmp_path / "theirs") != checkpoint.fingerprint(tmp_path / "saved")
    with refused(tmp_path / "saved", "embeds"):
        checkpoint.load(tmp_path / "saved")
    with refused("CLIP", "layout"):
        export(tmp_path / "ours", "original", tmp_path / "pth")
    assert not (tmp_path / "pth").exists()
    (tmp_path / "saved" / "tokenizer.json").unlink()
    for name in ("merges.txt", "vocab.json"):
        (tmp_path / "saved" / name).unlink(missing_ok=True)
    with refused("tokenizer.json", "merges.txt"):
        checkpoint.open_any(tmp_path / "saved")


def test_the_image_side_is_initialised_as_released():
    # Catches: the text side's scheme on the image side. Released: torch's defaults, of MultiheadAttention and linears.
    width, hidden = 128, 512
    clip = build(
        ClipConfig(
            ClipVisionConfig(32, 8, width, 4, 2, hidden), ClipTextConfig(99, 16, 64, 4, 1, 256), embed_dim=32
        )
    )
    torch.manual_seed(0)
    attention, linear = nn.MultiheadAttention(width, 2), nn.Linear(width, hidden)
    back, patches = nn.Linear(hidden, width), nn.Conv2d(3, width, 8, 8, bias=False)

    def alike(ours, theirs):
        spread = ours.abs().max() / theirs.abs().max()
        return 0.9 < float(ours.std() / theirs.std()) < 1.1 and 0.9 < float(spread) < 1.1

    assert alike(clip.visual_encoder.patch_embed.weight, patches.weight)
    for block in clip.visual_encoder.blocks:
        assert alike(block.attn.qkv.weight, attention.in_proj_weight)
        assert alike(block.attn.proj.weight, attention.out_proj.weight)
        assert alike(block.mlp.fc1.weight, linear.weight)
        assert alike(block.mlp.fc1.bias, linear.bias)
        assert alike(block.mlp.fc2.weight, back.weight)
        assert not block.attn.qkv.bias.any()
        assert not block.attn.proj.bias.any()
    for block in clip.text_encoder.blocks:
        assert float(block.attn.qkv.weight.std()) == pytest.approx(64**-0.5, rel=0.1)
        assert float(block.attn.proj.weight.std()) == pytest.approx(64**-0.5 * 8**-0.5, rel=0.1)
        assert float(block.mlp.fc1.weight.std()) == pytest.approx(128**-0.5, rel=0.1)
        assert float(block.mlp.fc2.weight.std()) == pytest.approx(64**-0.5 * 8**-0.5, rel=0.1)
