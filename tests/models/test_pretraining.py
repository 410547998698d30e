"""Bugs caught here: gradients that leak into momentum towers; towers that move at the wrong time; a temperature that is not
clamped; objectives that sum, chunk or recompute to something else than their parts; queued twins taken for negatives.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.models import build
from capfilt.models.blip import model as p
from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.common import momentum as alignment
from capfilt.models.common import objectives as o
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from tests.models.rows import MICRO, itc_by_hand, rows
from tests.refusals import refused


def test_a_new_model_of_published_width_starts_near_the_logarithm_of_its_candidates():
    """Fresh towers map every image (and every text) near one point, so all similarities of a row are alike."""
    wide = BlipConfig(
        vision=VisionConfig(16, 8, width=768, depth=1, heads=12, hidden=64),
        text=TextConfig(40, 768, 1, 12, 64, max_positions=16, dropout=0.0, attention_dropout=0.0),
    )
    trainer = p.BlipPretraining(build(wide), p.PretrainingConfig(objectives=("itc",), queue_size=20)).train()
    for seed in range(5):
        with torch.no_grad():
            loss = trainer.losses(rows(6, seed=seed))["itc"].item()
        assert loss == pytest.approx(math.log(6 + min(20, 6 * seed)), abs=0.35)


def test_unfilled_slots_do_not_enter_the_loss():
    """A queue of 50,000 slots of which none is filled must cost nothing: the loss is that of the batch alone."""
    batch = rows()
    with_queue = p.BlipPretraining(build(MICRO), p.PretrainingConfig(objectives=("itc",), queue_size=50_000))
    without = p.BlipPretraining(build(MICRO), p.PretrainingConfig(objectives=("itc",), queue_size=0))
    assert with_queue.losses(batch)["itc"].item() == pytest.approx(
        without.losses(batch)["itc"].item(), abs=1e-6
    )


def test_queued_twins_are_positives_not_negatives():
    # The same batch again: each row's candidates now hold itself twice, and both count.
    trainer = p.BlipPretraining(
        build(MICRO), p.PretrainingConfig(objectives=("itc",), queue_size=32, momentum=None)
    )
    trainer.train()
    batch = rows(4)
    trainer.losses(batch)
    queued = trainer.queue.candidates()
    image, text = queued.image.clone(), queued.text.clone()
    loss = trainer.losses(batch)["itc"].item()
    target = torch.cat([torch.eye(4), torch.eye(4)], dim=1) / 2
    twice = (torch.cat([image, image]), torch.cat([text, text]))
    hand = itc_by_hand(image, text, *twice, 0.07, (target, target), [True] * 8)
    assert loss == pytest.approx(hand, abs=1e-5)


def test_each_subset_of_objectives_gives_its_losses():
    for names in (
        ("itc",),
        ("itm",),
        ("lm",),
        ("itc", "itm"),
        ("itm", "lm"),
        ("itc", "lm"),
        ("itc", "itm", "lm"),
    ):
        trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(objectives=names, queue_size=8)).train()
        found = trainer.losses(rows(), 0.2)
        assert set(names) == {"itc", "itm", "lm"} & set(found)
        assert found["loss"].item() == pytest.approx(sum(found[name].item() for name in names), abs=1e-5)
        assert all(value.dtype == torch.float32 and value.dim() == 0 for value in found.values())
        found["loss"].backward()


def test_weights_multiply_losses():
    torch.manual_seed(0)
    config = p.PretrainingConfig(momentum=None, queue_size=0, weights={"lm": 2.0, "itc": 0.5})
    found = p.BlipPretraining(build(MICRO), config).losses(rows())
    hand = 0.5 * found["itc"].item() + found["itm"].item() + 2.0 * found["lm"].item()
    assert found["loss"].item() == pytest.approx(hand, abs=1e-5)


def gradients(trainer: p.BlipPretraining) -> set[str]:
    return {
        n
        for n, p in trainer.model.named_parameters(remove_duplicate=False)
        if p.grad is not None and p.grad.any()
    }


def test_gradients_flow_where_each_loss_says_and_never_into_momentum():
    heads = {
        ("itc",): {"vision_proj.weight", "text_proj.weight", "temperature"},
        ("itm",): {"itm_head.weight"},
        ("lm",): {
            "text_decoder.cls.predictions.bias",
            "text_decoder.bert.encoder.layer.0.attention.self.query.weight",
        },
    }
    crossed = "text_encoder.encoder.layer.0.crossattention.self.key.weight"
    for names, wanted in heads.items():
        trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(objectives=names, queue_size=8)).train()
        trainer.losses(rows(), 0.4)["loss"].backward()
        touched = gradients(trainer)
        assert wanted <= touched
        assert not touched & set.union(*(other for key, other in heads.items() if key != names))
        assert "visual_encoder.pos_embed" in touched
        assert (crossed in touched) == (names != ("itc",))
        momentum = [] if trainer.momentum is None else list(trainer.momentum.parameters())
        assert (trainer.momentum is not None) == (names == ("itc",))
        assert all(p.grad is None and not p.requires_grad for p in momentum)


def test_without_momentum_gradients_reach_both_sides_of_the_similarity():
    """With momentum the candidates are constants; without, a text also moves towards the images that looked for it."""
    trainer = p.BlipPretraining(
        build(MICRO), p.PretrainingConfig(objectives=("itc",), momentum=None, queue_size=0)
    ).train()
    batch = rows(4)
    trainer.losses(batch)["itc"].backward()
    got = trainer.model.text_proj.weight.grad.clone()
    trainer.zero_grad()
    model = trainer.model
    image = model.embed_image(model.encode_image(batch.pixels))
    text = model.embed_text(batch.ids, batch.mask)
    logits = image @ text.T / model.temperature
    labels = torch.arange(4)
    loss = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(
        logits.T, labels
    )
    (loss / 2).backward()
    assert torch.allclose(got, model.text_proj.weight.grad, atol=1e-5)


def test_momentum_towers_follow_and_are_used():
    trainer = p.BlipPretraining(
        build(MICRO), p.PretrainingConfig(objectives=("itc",), momentum=0.5, queue_size=8)
    )
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    frozen = copy.deepcopy(trainer.momentum)
    live = dict(trainer.model.named_parameters(remove_duplicate=False))
    batch = rows(4)
    trainer.after_step()
    trainer.losses(batch)
    with torch.no_grad():
        for name, parameter in frozen.named_parameters():
            parameter.copy_((parameter + live[name]) / 2)
        expected = frozen.embed_image(batch.pixels)
    assert torch.allclose(trainer.queue.candidates().image, expected, atol=1e-6)
    for name, parameter in trainer.momentum.named_parameters():
        assert torch.allclose(parameter, frozen.get_parameter(name), atol=1e-6), name


def test_losses_move_no_towers_and_fill_the_queue():
    trainer = p.BlipPretraining(
        build(MICRO), p.PretrainingConfig(objectives=("itc",), momentum=0.5, queue_size=8)
    ).train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1)
        trainer.model.temperature.fill_(0.9)
    before = [parameter.clone() for parameter in trainer.momentum.parameters()]
    trainer.losses(rows(3))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.momentum.parameters(), strict=True))
    assert trainer.model.temperature.item() == pytest.approx(0.9)
    assert trainer.queue.filled == 3


@pytest.mark.parametrize("momentum", [0.995, None])
def test_recomputed_activations_give_the_same_losses_and_gradients(momentum):
    """A recomputation that draws other dropout masks, drop-paths or negatives than the pass it repeats."""
    config = dataclasses.replace(
        MICRO,
        vision=dataclasses.replace(MICRO.vision, depth=2, drop_path=0.5),
        text=dataclasses.replace(MICRO.text, dropout=0.3, attention_dropout=0.3),
    )
    found = []
    for on in (False, True):
        trainer = p.BlipPretraining(
            build(config), p.PretrainingConfig(queue_size=8, momentum=momentum)
        ).train()
        recompute_activations(trainer.model, on)
        torch.manual_seed(5)
        losses = trainer.losses(rows(), 0.4)
        losses["loss"].backward()
        gradients = {name: each.grad for name, each in trainer.named_parameters() if each.grad is not None}
        found.append((losses, gradients, torch.rand(3)))
    (kept, kept_gradients, kept_next), (again, again_gradients, again_next) = found
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name
    assert kept_gradients.keys() == again_gradients.keys()
    for name, gradient in kept_gradients.items():
        assert torch.allclose(gradient, again_gradients[name], atol=1e-6), name
    # What is drawn after the step is what would have been drawn anyway: a resumed run may switch it on.
    assert torch.equal(kept_next, again_next)


def test_recomputing_keeps_fewer_tensors_for_the_backward_pass():
    def kept(on):
        trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=0, momentum=None)).train()
        recompute_activations(trainer.model, on)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            trainer.losses(rows())
        return sum(sizes)

    assert kept(True) < 0.6 * kept(False)


def test_evaluation_moves_nothing():
    trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=8)).eval()
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    with torch.no_grad():
        trainer.model.temperature.fill_(0.9)
        before["model.temperature"].fill_(0.9)
        trainer.losses(rows(), 0.4)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state_dict().items())


@pytest.mark.parametrize(("value", "clamped"), [(3.0, 0.5), (-1.0, 0.001), (0.2, 0.2)])
def test_temperature_is_clamped_in_place(value, clamped):
    trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=0)).train()
    with torch.no_grad():
        trainer.model.temperature.fill_(value)
    trainer.after_step()
    assert trainer.losses(rows())["temperature"].item() == pytest.approx(clamped)
    assert trainer.model.temperature.item() == pytest.approx(clamped)
    # A checkpoint may come with another temperature: its first step is no exception.
    trainer.model.temperature.data.fill_(value)
    again = p.BlipPretraining(trainer.model, p.PretrainingConfig(queue_size=0))
    assert again.losses(rows())["temperature"].item() == pytest.approx(clamped)


def test_soft_targets_change_the_loss_only_with_alpha():
    trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(objectives=("itc",), queue_size=0))
    hard, soft = trainer.losses(rows(), 0.0)["itc"], trainer.losses(rows(), 0.4)["itc"]
    image, text = (
        trainer.momentum.embed_image(rows().pixels),
        trainer.momentum.embed_text(rows().ids, rows().mask),
    )
    eye = torch.eye(6)
    targets = []
    for a, b in ((image, text), (text, image)):
        targets.append(0.4 * (a @ b.T / 0.07).softmax(1) + 0.6 * eye)
    # Momentum towers are still equal to the live ones here, so the candidates are the embeddings themselves.
    hand = itc_by_hand(image, text, image, text, 0.07, targets, [True] * 6)
    assert soft.item() == pytest.approx(hand, abs=1e-4)
    assert hard.item() != pytest.approx(soft.item(), abs=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 2, 32])
def test_losses_equal_the_models_own_calls_one_row_at_a_time(monkeypatch, chunk_rows):
    """Shared cross-attention keys, one pass for 3B rows, groups of similar length and no padding mask in LM must not
    change a single number.
    """
    monkeypatch.setattr(alignment, "CHUNK_ROWS", chunk_rows)
    model = build(MICRO).eval()
    trainer = p.BlipPretraining(model, p.PretrainingConfig(momentum=None, queue_size=0)).eval()
    batch = rows(5)
    torch.manual_seed(4)
    found = trainer.losses(batch)
    tokens = model.encode_image(batch.pixels)
    image, text = model.embed_image(tokens), model.embed_text(batch.ids, batch.mask)
    torch.manual_seed(4)
    wrong_text, _ = o.hard_negatives(image @ text.T / 0.07, batch.image_index, batch.text_index)
    wrong_image, _ = o.hard_negatives(text @ image.T / 0.07, batch.image_index, batch.text_index)
    itm, lm, words = [], [], 0
    for i in range(5):
        for a, b, label in ((i, i, 1), (int(wrong_image[i]), i, 0), (i, int(wrong_text[i]), 0)):
            keep = batch.mask[b]
            logits = model.match_logits(batch.ids[b : b + 1, keep], None, tokens[a : a + 1])
            itm.append(-logits.log_softmax(1)[0, label].item())
        keep = batch.mask[i]
        ids = batch.ids[i : i + 1, keep]
        logits = model.lm_logits(ids, None, tokens[i : i + 1])
        lm.append(
            o.language_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool)).item() * (ids.shape[1] - 1)
        )
        words += ids.shape[1] - 1
    hard = torch.eye(5)
    assert found["itc"].item() == pytest.approx(
        itc_by_hand(image, text, image, text, 0.07, (hard, hard), [True] * 5), abs=1e-4
    )
    assert found["itm"].item() == pytest.approx(sum(itm) / 15, abs=1e-5)
    assert found["lm"].item() == pytest.approx(sum(lm) / words, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=80), st.integers(1, 40))
def test_length_chunks_have_every_row_once_and_cut_nothing(lengths, chunk_rows):
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    before, alignment.CHUNK_ROWS = alignment.CHUNK_ROWS, chunk_rows
    try:
        groups = alignment.length_chunks(mask)
    finally:
        alignment.CHUNK_ROWS = before
    assert len(groups) <= alignment.MAX_CHUNKS
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(len(lengths)))
    for some, length in groups:
        assert torch.equal(mask[some, :length].sum(1), mask[some].sum(1))


def test_a_prompt_is_given_not_learned():
    model = build(MICRO).eval()
    batch = rows(4)
    plain = p.BlipPretraining(model, p.PretrainingConfig(objectives=("lm",)))
    prompted = p.BlipPretraining(model, p.PretrainingConfig(objectives=("lm",), prompt_length=3))
    logits = model.lm_logits(batch.ids, batch.mask, model.encode_image(batch.pixels))
    assert prompted.losses(batch)["lm"].item() == pytest.approx(
        o.language_loss(logits, batch.ids, batch.mask, 3).item(), abs=1e-5
    )
    assert plain.losses(batch)["lm"].item() != pytest.approx(prompted.losses(batch)["lm"].item(), abs=1e-4)


@pytest.mark.parametrize("chunk_rows", [2, 64])
def test_synthetic_texts_are_contrasted_and_matched_and_not_written(monkeypatch, chunk_rows):
    """Would catch: a language model that learns the captioner's mistakes, or a mean over texts that it does not learn."""
    monkeypatch.setattr(alignment, "CHUNK_ROWS", chunk_rows)
    model, batch = build(MICRO).eval(), rows(6)
    written = torch.tensor([True, False, False, True, True, False])
    given = dataclasses.replace(batch, synthetic=written)

    def found(batch, **config):
        return p.BlipPretraining(model, p.PretrainingConfig(queue_size=0, momentum=None, **config)).losses(
            batch
        )

    torch.manual_seed(0)
    plain = found(batch)
    torch.manual_seed(0)
    left = found(given, lm_synthetic=False)
    assert [left[name].item() for name in ("itc", "itm")] == [plain[name].item() for name in ("itc", "itm")]
    logits = model.lm_logits(batch.ids, batch.mask, model.encode_image(batch.pixels))[~written]
    wanted = o.language_loss(logits, batch.ids[~written], batch.mask[~written]).item()
    assert left["lm"].item() == pytest.approx(wanted, abs=1e-5)
    assert found(given)["lm"].item() == plain["lm"].item() != pytest.approx(wanted, abs=1e-4)
    none = found(dataclasses.replace(batch, synthetic=torch.ones(6, dtype=torch.bool)), lm_synthetic=False)
    assert none["lm"].item() == 0
    none["loss"].backward()


def test_duplicates_fill_a_batch_without_negatives():
    batch = dataclasses.replace(rows(4), image_index=torch.zeros(4, dtype=torch.int64))
    found = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=4)).train().losses(batch, 0.4)
    assert found["itm"].item() == 0.0
    assert math.isfinite(found["loss"].item())


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_any_batch_size_goes_through_a_small_queue(count):
    trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=7)).train()
    for seed in range(3):
        found = trainer.losses(rows(count, seed=seed), 0.4)
        assert all(math.isfinite(value.item()) for value in found.values())
        found["loss"].backward()


def test_a_frozen_tower_is_left_out_of_the_average():
    model = build(MICRO)
    model.visual_encoder.requires_grad_(False)
    trainer = p.BlipPretraining(model, p.PretrainingConfig(queue_size=4))
    mine, live = alignment.followed(trainer.momentum, model)
    assert len(mine) == len(live) > 0
    assert not {id(p) for p in live} & {id(p) for p in model.visual_encoder.parameters()}


def test_towers_carry_nothing_that_texts_alone_do_not_use():
    names = [name for name, _ in p.BlipPretraining(build(MICRO)).momentum.named_parameters()]
    assert not [name for name in names if "crossattention" in name or "decoder" in name or "itm" in name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objectives": ("itc", "mlm")}, "objectives"),
        ({"objectives": ()}, "objectives"),
        ({"objectives": ("lm",), "weights": {"itc": 1.0}}, "itc"),
        ({"queue_size": -1}, "queue_size"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_wrong_options_are_named(options, said):
    with refused(said):
        p.PretrainingConfig(**options)


def test_half_precision_keeps_losses_in_fp32():
    trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=8)).eval()
    exact = trainer.losses(rows(), 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        rough = trainer.losses(rows(), 0.4)
    assert all(value.dtype == torch.float32 for value in rough.values())
    assert rough["lm"].item() == pytest.approx(exact["lm"].item(), rel=0.05)
    assert rough["itc"].item() == pytest.approx(exact["itc"].item(), rel=0.1)


def test_model_is_a_blip():
    # What is saved after training is `trainer.model` alone: nothing of the trainer may hang on it.
    trainer = p.BlipPretraining(build(MICRO))
    assert isinstance(trainer.model, Blip)
    assert set(trainer.model.state_dict()) == set(build(MICRO).state_dict())


@pytest.mark.parametrize(
    ("config", "by_own", "floor"),
    [
        # BLIP's pretraining: text and image features of the momentum towers, and 1e-4 to every candidate.
        ({"objectives": ("itc", "itm", "lm")}, False, 1e-4),
        # What `finetune filter` asks for, as BLIP's retrieval code: the model's own features, and no floor.
        ({"objectives": ("itc", "itm"), "own_negatives": True, "negative_floor": 0.0}, True, 0.0),
        ({"objectives": ("itm",), "own_negatives": True, "negative_floor": 0.0}, True, 0.0),
        ({"objectives": ("itc", "itm"), "own_negatives": True, "momentum": None}, True, 1e-4),
    ],
)
def test_negatives_are_drawn_by_the_released_similarities(monkeypatch, config, by_own, floor):
    # Catches: retrieval finetuned with negatives by the momentum towers' embeddings, or with pretraining's floor.
    trainer = p.BlipPretraining(build(MICRO), p.PretrainingConfig(queue_size=8, **config)).eval()
    with torch.no_grad():
        for tensor in trainer.momentum.parameters() if trainer.momentum is not None else ():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    drawn, draw = [], alignment.hard_negatives

    def watched(scores, *args, floor, **options):
        drawn.append((scores, floor))
        return draw(scores, *args, floor=floor, **options)

    monkeypatch.setattr(alignment, "hard_negatives", watched)
    batch = rows(6)
    with torch.no_grad():
        trainer.losses(batch)
        model, towers = trainer.model, trainer.momentum
        image = model.embed_image(model.encode_image(batch.images))
        text = model.embed_text(batch.ids, batch.mask)
        images, texts = image, text
        if not by_own:
            images, texts = towers.embed_image(batch.images), towers.embed_text(batch.ids, batch.mask)
            assert not torch.allclose(images, image, atol=0.01)
        expected = (image @ texts.T / model.temperature, text @ images.T / model.temperature)
    for (scores, least), wanted in zip(drawn, expected, strict=True):
        assert torch.allclose(scores, wanted, atol=1e-4)
        assert least == floor
