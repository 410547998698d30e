"""Catches: rows lost or done twice where memory runs out, a batch that is never tried smaller or never tried again, an endless
loop at one row, memory that runs out under another name, what one engine keeps while its neighbour has no room, tokens of
one vision tower given to a model that learned with another, pixels that are nearly those that the released code sees."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from capfilt.errors import UserError
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from tests.refusals import refused

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # BLIP's configuration


def made_photographs():
    """20 pictures of odd sizes: smooth light, hard edges and grain, as JPEGs."""
    encoded = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        width, height = int(rng.integers(40, 400)) * 2 + 1, int(rng.integers(30, 300)) * 2 + 1
        light = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
        rows = np.asarray(light).astype(int) + rng.integers(-20, 21, (height, width, 3))
        rows[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        buffer = io.BytesIO()
        Image.fromarray(rows.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def real_photographs(data):
    """20 of COCO's, cut to odd sizes."""
    rows = json.loads((data / "clean" / "captions.json").read_text())["images"]
    names = [row["file_name"] for row in rows if row["file_name"].startswith("coco")][:20]
    encoded = []
    for number, name in enumerate(names):
        with Image.open(data / "clean" / "images" / name) as image:
            buffer = io.BytesIO()
            odd = image.convert("RGB").crop((0, 0, image.width - 2 * number | 1, image.height - number | 1))
            odd.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


@pytest.mark.parametrize("kind", ["made", "real"])
@torch.no_grad()
def test_photographs_of_odd_sizes_give_what_the_published_model_gives(
    pair, transformers_twins, released_beam_search, request, kind
):
    # Catches: another bicubic filter, another scaled decoding, a crop, other statistics: one greedy caption in six.
    data = made_photographs() if kind == "made" else real_photographs(request.getfixturevalue("shared_data"))
    model, tokenizer = pair
    twins = transformers_twins(model, tokenizer.sep_id)
    rows = [
        np.asarray(Image.open(io.BytesIO(each)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
        for each in data
    ]
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    captioner, scorer = Captioner(model, tokenizer), Filter(model, tokenizer)

    ids = tokenizer.encode(["a picture of"])[0]
    said = twins["captioner"].generate(
        pixels,
        ids.repeat(20, 1),
        do_sample=False,
        num_beams=1,
        max_length=ids.shape[1] - 1 + 12,
        min_length=5,
    )
    greedy = [tokenizer.decode(row).removeprefix("a picture of").strip() for row in said]
    ours = captioner.caption(data, method="greedy", max_new_tokens=12)
    assert [each.text for each in ours] == greedy
    assert len(set(greedy)) > 2

    prompt = captioner.prompt_ids("a picture of").tolist()
    seen = twins["captioner"].vision_model(pixel_values=pixels).last_hidden_state
    beams = captioner.caption(data, method="beam", samples=3, max_new_tokens=8, beam_rule="released")
    for image in range(20):

        def logits_of(row, at=image):
            decoder = twins["captioner"].text_decoder
            return decoder(
                input_ids=torch.tensor([row]), encoder_hidden_states=seen[at : at + 1], is_decoder=True
            ).logits[0, -1]

        expected = released_beam_search(logits_of, prompt, tokenizer.sep_id, 8, 1, 3, 1.0)
        for (score, text), caption in zip(expected, beams[3 * image : 3 * image + 3], strict=True):
            whole = tokenizer.decode([*prompt, *text]).removeprefix("a picture of").strip()
            length = len(prompt) + len(text) - (text[-1] == tokenizer.sep_id)
            assert caption.text == whole
            assert caption.logprob / length == pytest.approx(score, abs=1e-4)

    texts = ["a red dog", "two cats on the left", "the ball sits"] * 7
    found = scorer.score(data, texts[:20])
    for image, (text, score) in enumerate(zip(texts, found, strict=False)):
        ids, mask = tokenizer.encode([text])
        ids[:, 0] = tokenizer.enc_id
        logits = twins["retrieval"](
            input_ids=ids, pixel_values=pixels[image : image + 1], attention_mask=mask.long()
        )[0]
        assert score.itm_score == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-6)


SAID = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory")
    if hasattr(torch, "AcceleratorError")
    else RuntimeError("CUDA driver error: out of memory"),
]


def scarce(engine, monkeypatch, most, error=SAID[0]):
    """The engine's model, with room for `most` images at a time; returns the batches that were tried."""
    tried = []
    encode = engine.model.encode_image

    def limited(batch):
        tried.append(len(batch))
        if len(batch) > most:
            raise error
        return encode(batch)

    monkeypatch.setattr(engine.model, "encode_image", limited)
    return tried


def test_captions_are_the_same_in_batches_halved_for_memory(pair, images, monkeypatch):
    expected = Captioner(*pair).caption(images, samples=2, seed=3)
    captioner = Captioner(*pair)
    tried = scarce(captioner, monkeypatch, 2)
    made = captioner.caption(images, samples=2, seed=3)
    assert [each.text for each in made] == [each.text for each in expected]
    assert tried == [7, 7, 3, 3, 1, *[1] * 6]
    assert captioner.fits == 1
    captioner.caption(images)
    assert tried[11:] == [1] * 7, "what did not fit is not tried again"


def test_scores_are_the_same_in_batches_halved_for_memory(pair, images, monkeypatch):
    texts, index = ["a dog", "two cats", "the ball", "red", "green"], [6, 0, 3, 0, 5]
    expected = Filter(*pair).score_texts(images, index, texts)
    scorer = Filter(*pair)
    tried = scarce(scorer, monkeypatch, 2)
    for a, b in zip(scorer.score_texts(images, index, texts), expected, strict=True):
        assert a.itm_score == pytest.approx(b.itm_score, abs=1e-5)
        assert a.itc_score == pytest.approx(b.itc_score, abs=1e-5)
    assert tried == [4, 4, 2, 2]
    assert scorer.fits == 2


def test_one_encode_serves_both_where_the_towers_are_the_same(pair, images):
    """As two checkpoints finetuned with their vision towers frozen are: the same tower, other text sides."""
    other = copy.deepcopy(pair[0])
    with torch.no_grad():
        other.itm_head.bias.add_(1.0)
    captioner, scorer = Captioner(*pair), Filter(other, pair[1])
    texts, index = ["a dog", "two cats", "the ball"], [6, 0, 3]
    captions, scores = captioner.caption(images), scorer.score_texts(images, index, texts)
    encoded = captioner.encode(images)
    with refused("Engine.share_vision"):
        scorer.score_texts(encoded, index, texts)
    captioner.share_vision(scorer)
    assert [each.text for each in captioner.caption(encoded, batch_size=3)] == [
        each.text for each in captions
    ]
    for a, b in zip(scorer.score_texts(encoded, index, texts), scores, strict=True):
        assert a.itm_score == pytest.approx(b.itm_score, abs=1e-5)
    assert scorer.score_texts(images, index, texts) == scores

    apart = copy.deepcopy(pair[0])
    with torch.no_grad():
        apart.visual_encoder.norm.bias[0] += 1e-3
    with pytest.raises(UserError, match="freeze vision"):
        captioner.share_vision(Filter(apart, pair[1]))
    low = [kind(model, pair[1], precision="int8") for kind, model in ((Captioner, pair[0]), (Filter, other))]
    low[0].share_vision(low[1])
    with torch.no_grad():
        apart.visual_encoder.blocks[0].mlp.fc1.weight.mul_(2.0)
        apart.visual_encoder.norm.bias.copy_(pair[0].visual_encoder.norm.bias)
    with pytest.raises(UserError, match="freeze vision"):
        low[0].share_vision(Filter(apart, pair[1], precision="int8"))


@pytest.mark.parametrize("error", SAID, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_by_any_name_is_known(pair, images, monkeypatch, error):
    captioner = Captioner(*pair)
    expected = captioner.caption(images)
    tried = scarce(captioner, monkeypatch, 4, error)
    assert [each.text for each in captioner.caption(images)] == [each.text for each in expected]
    assert tried == [7, 7, 3, 3, 1]
    scarce(captioner, monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        captioner.caption(images)


def test_an_error_that_came_of_memory_running_out_counts(pair, images, monkeypatch):
    """As a recording that ends in the middle of one says something else."""
    captioner = Captioner(*pair)
    encode, tried = captioner.model.encode_image, []

    def failing(batch):
        tried.append(len(batch))
        if len(tried) > 1:
            return encode(batch)
        try:
            raise SAID[0]
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(captioner.model, "encode_image", failing)
    assert len(captioner.caption(images)) == 7
    assert tried == [7, 7]


def test_what_fits_once_both_engines_let_go_is_not_halved(pair, images, monkeypatch):
    captioner, scorer = Captioner(*pair), Filter(*pair)
    captioner.share_vision(scorer)
    kept = {captioner: True, scorer: True}
    for engine in kept:
        monkeypatch.setattr(engine, "release", lambda engine=engine: kept.update({engine: False}))
    encoded, match, tried = captioner.encode(images), scorer.model.match_logits, []

    def limited(ids, *rest):
        tried.append(len(ids))
        if any(kept.values()):
            raise SAID[0]
        return match(ids, *rest)

    monkeypatch.setattr(scorer.model, "match_logits", limited)
    assert len(scorer.score_texts(encoded, range(7), ["a dog"] * 7)) == 7
    assert tried == [7, 7]
    assert (captioner.fits, scorer.fits) == (0, 0)


def test_what_is_encoded_is_not_put_together_again(pair, images, monkeypatch):
    captioner = Captioner(*pair)
    expected = [each.text for each in captioner.caption(images, batch_size=5)]
    (whole,) = captioner.encode(images).parts
    scarce(captioner, monkeypatch, 3)
    encoded = captioner.encode(images)
    assert [len(each) for each in encoded.parts] == [3, 3, 1]
    for chosen in ([0, 1], [2, 3], [1, 4, 6], [6], list(range(7))):
        torch.testing.assert_close(encoded.rows(chosen), whole[chosen], atol=1e-5, rtol=1e-5)
    assert encoded.rows([3, 4]).data_ptr() == encoded.parts[1].data_ptr()
    assert [each.text for each in captioner.caption(encoded, batch_size=5)] == expected


def test_one_image_that_does_not_fit_is_said(pair, images, monkeypatch):
    captioner = Captioner(*pair)
    scarce(captioner, monkeypatch, 0)
    with refused("GPU", "out of memory"):
        captioner.caption(images)
