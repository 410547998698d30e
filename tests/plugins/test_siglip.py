"""Catches: a `siglip_score` that is not transformers' own cosine or probability, or that depends on the batch."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from capfilt.plugins.clip import ClipScorer, SiglipScorer
from tests.plugins.test_clip import PICTURES, TEXTS, save_clip
from tests.refusals import refused

transformers = pytest.importorskip("transformers")

SIDE, LONGEST = 24, 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random SigLIP, with the tokenizer of the tiny CLIP."""
    place = save_clip(tmp_path_factory.mktemp("siglip"))
    vocabulary = transformers.AutoTokenizer.from_pretrained(place).vocab_size
    text = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": LONGEST, "projection_size": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "head" in name:
                parameter.normal_(0, 0.3)
        model.logit_scale.fill_(1.0)
        model.logit_bias.fill_(-0.5)
    model.save_pretrained(place)
    pictures = {
        "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
    }  # fmt: skip
    (place / "preprocessor_config.json").write_text(json.dumps(pictures))
    return place


@pytest.fixture(scope="module")
def scorer(directory):
    made = SiglipScorer(str(directory))
    made.setup()
    return made


def scored(scorer, batch_size=64):
    index = [0, 1, 2, 3, 1]
    images = [scorer.prepare(data) for data in PICTURES]
    return scorer.score(images, index, TEXTS, batch_size=batch_size), index


def test_scores_are_transformers_own(directory, scorer):
    scores, index = scored(scorer)
    model = transformers.SiglipModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)
    pixels = processor.from_pretrained(directory)(
        [Image.open(io.BytesIO(PICTURES[i])) for i in index], return_tensors="pt"
    )
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
    with torch.inference_mode():
        out = model(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"])
    wanted = torch.stack(
        [(out.image_embeds * out.text_embeds).sum(-1), out.logits_per_image.diagonal().sigmoid()], dim=1
    )
    assert scores.dtype == np.float32
    assert list(scorer.columns) == ["siglip_score", "siglip_probability"]
    assert np.abs(scores - wanted.numpy()).max() < 1e-5
    assert scores[:, 0].std() > 0.02  # else the comparison would say nothing


def test_the_score_does_not_depend_on_the_batch(scorer):
    assert np.allclose(scored(scorer)[0], scored(scorer, batch_size=1)[0], atol=1e-6)


def test_a_clip_is_no_siglip_and_the_other_way_round(directory, tmp_path):
    with refused("model_type siglip clip"):
        ClipScorer(str(directory))
    with refused("model_type clip siglip"):
        SiglipScorer(str(save_clip(tmp_path)))
