"""Catches: a tensor of a transformers ViT, DeiT or BERT put in the wrong place, fused in the wrong order or silently
left out; a directory of another geometry taken."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from capfilt.models import build
from capfilt.models.blip.model import BlipConfig, start_text
from capfilt.models.common.pretrained import load_vit
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig, VisionTower, resize_position_embedding
from tests.refusals import refused

transformers = pytest.importorskip("transformers")

VISION = VisionConfig(32, 8, width=24, depth=2, heads=3, hidden=48)
GEOMETRY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


def loud(model):
    """Random weights of ordinary size everywhere, biases included: a misplaced tensor must show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def vit(kind: str = "ViT", head: str = "Model", **fields):
    config = getattr(transformers, f"{kind}Config")(
        **{**GEOMETRY, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, **fields}
    )
    return loud(getattr(transformers, f"{kind}{head}")(config))


@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
def test_vit_gives_transformers_outputs(tmp_path, head):
    theirs = vit(head=head)
    theirs.save_pretrained(tmp_path)
    ours = VisionTower(VISION).eval()
    load_vit(ours, tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        backbone = theirs.vit if head != "Model" else theirs
        assert torch.allclose(ours(pixels), backbone(pixels).last_hidden_state, atol=1e-5)


def test_deit_without_its_distillation_token(tmp_path):
    theirs = vit("DeiT")
    theirs.save_pretrained(tmp_path)
    ours = VisionTower(VISION)
    load_vit(ours, tmp_path)
    positions = theirs.embeddings.position_embeddings
    assert torch.equal(ours.pos_embed[:, 0], positions[:, 0])
    assert torch.equal(ours.pos_embed[:, 1:], positions[:, 2:])


def test_positions_are_resized_to_this_towers_grid(tmp_path):
    theirs = vit(image_size=48)
    theirs.save_pretrained(tmp_path)
    ours = VisionTower(VISION)
    load_vit(ours, tmp_path)
    assert torch.equal(
        ours.pos_embed, resize_position_embedding(theirs.embeddings.position_embeddings.detach(), 4)
    )


def test_what_does_not_fit_is_listed_and_nothing_is_copied(tmp_path):
    vit().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.attention.attention.key.bias"]
    weights["encoder.layer.1.gate.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    ours = VisionTower(VISION)
    before = ours.cls_token.detach().clone()
    with refused("missing", "encoder.layer.1.attention.attention.key.bias", "encoder.layer.1.gate.weight"):
        load_vit(ours, tmp_path)
    assert torch.equal(ours.cls_token, before)


def test_other_geometry_is_named(tmp_path):
    vit(num_attention_heads=2).save_pretrained(tmp_path)
    with refused("num_attention_heads", 2, 3):
        load_vit(VisionTower(VISION), tmp_path)
    with refused("model_type"):
        start_text(build(BlipConfig(vision=VISION, text=TextConfig(32, 24, 2, 3, 48))), tmp_path)
    with refused(tmp_path / "absent" / "config.json"):
        load_vit(VisionTower(VISION), tmp_path / "absent")


def test_bert_reads_text_alone_like_transformers(tmp_path):
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=20, **GEOMETRY)
    theirs = loud(transformers.BertForPreTraining(config))
    with torch.no_grad():
        theirs.bert.embeddings.token_type_embeddings.weight.zero_()  # BLIP's text transformer has none
    theirs.save_pretrained(tmp_path)
    model = build(BlipConfig(vision=VISION, text=TextConfig(32, 24, 2, 3, 48, max_positions=20))).eval()
    fresh = model.text_encoder.embeddings.word_embeddings.weight[30:].detach().clone()
    start_text(model, tmp_path)
    ids = torch.randint(0, 30, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad():
        expected = theirs.bert(ids, attention_mask=mask.long()).last_hidden_state
        assert torch.allclose(model.encode_text(ids, mask)[mask], expected[mask], atol=1e-5)
        assert torch.allclose(model.text_decoder.bert(ids, mask)[mask], expected[mask], atol=1e-5)
    assert torch.equal(model.text_encoder.embeddings.word_embeddings.weight[30:], fresh)
