"""transformers' BLIP with our weights: the published architecture and its decoding, written by others."""

from __future__ import annotations

import pytest


def twins(model, sep_id=3):
    """transformers' captioner and retrieval model with `model`'s weights, through the published names."""
    transformers = pytest.importorskip("transformers")
    text, vision = model.config.text, model.config.vision
    config = transformers.BlipConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "encoder_hidden_size": vision.width,
            "intermediate_size": text.hidden,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "bos_token_id": text.dec_id,
            "sep_token_id": sep_id,
            "eos_token_id": sep_id,
            "pad_token_id": 0,
            "is_decoder": True,
        },
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        },
        image_text_hidden_size=model.config.embed_dim,
    )
    renames = [
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual_encoder.blocks", "vision_model.encoder.layers"),
        ("visual_encoder.norm", "vision_model.post_layernorm"),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = tensor
    twins = {
        "captioner": transformers.BlipForConditionalGeneration(config),
        "retrieval": transformers.BlipForImageTextRetrieval(config),
    }
    tied = {
        "text_decoder.cls.predictions.decoder.weight": state[
            "text_encoder.embeddings.word_embeddings.weight"
        ],
        "text_decoder.cls.predictions.decoder.bias": state["text_decoder.cls.predictions.bias"],
    }
    for twin in twins.values():
        wanted = twin.state_dict().keys()
        fitting = {name: each for name, each in {**state, **tied}.items() if name in wanted}
        missing, unexpected = twin.load_state_dict(fitting, strict=False)
        assert not missing, missing
        assert not unexpected
        twin.eval()
    return twins
