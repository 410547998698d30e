"""Catches losses that are not the paper's, soft targets of the wrong tower or weight, negatives that are drawn otherwise,
hidden tokens that are seen, and ranks that learn something else than one process would."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from capfilt.data.corpus import batches, from_images
from capfilt.data.tokenizer import Tokenizer
from capfilt.models.albef import Albef, build_albef, without_end
from capfilt.models.albef_pretraining import AlbefObjective, AlbefPretraining
from capfilt.models.masking import IGNORED, Masking
from capfilt.models.presets import albef_preset
from capfilt.models.ranks import Ranks
from capfilt.training.loop import TrainConfig, train
from tests.models.contrast_ranks import ROWS, gradients, gradients_of_two_ranks
from tests.models.rows import Rows, rows
from tests.models.test_albef import MICRO_ALBEF
from tests.refusals import refused
from tests.training.grids import pairs

FIXED = torch.zeros(40, dtype=torch.bool)
FIXED[[0, 2, 4, 38, 39]] = True
MASKING = Masking(4, FIXED, torch.zeros(40, dtype=torch.bool), share=0.4)


def trained(seed: int = 0, **config) -> AlbefPretraining:
    return AlbefPretraining(
        build_albef(MICRO_ALBEF, seed), MASKING, AlbefObjective(**{"queue_size": 16, **config})
    ).train()


def apart(trainer: AlbefPretraining) -> AlbefPretraining:
    """With towers that are not the model, and vectors that point somewhere."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, each in trainer.named_parameters():
            if not name.endswith("temperature"):
                each.add_(torch.randn(each.shape, generator=generator) * 0.1)
    return trainer


def cross_entropy(logits, target):
    return -(target * (logits - logits.exp().sum(dim=-1, keepdim=True).log())).sum(dim=-1)


def drawn(weights):
    """Which column each row draws by its weights, with the next of torch's random numbers."""
    totals = weights.double().cumsum(dim=1)
    thresholds = torch.rand(len(weights), 1).double() * totals[:, -1:]
    return [int((row > threshold).nonzero()[0]) for row, threshold in zip(totals, thresholds, strict=True)]


def by_hand(model: Albef, towers: Albef, queue, batch, alpha):
    """The three losses, from section 3 of the paper, a row at a time and with nothing used twice."""
    count = len(batch.ids)
    temperature = model.temperature
    texts = [without_end(batch.ids[i : i + 1, batch.mask[i]], None)[0] for i in range(count)]
    pictures = [model.encode_image(batch.pixels[i : i + 1]) for i in range(count)]
    image = torch.cat([model.embed_image(each) for each in pictures])
    text = torch.cat([model.embed_text(each) for each in texts])
    with torch.no_grad():
        pictures_m = [towers.encode_image(batch.pixels[i : i + 1]) for i in range(count)]
        image_m = torch.cat([*(towers.embed_image(each) for each in pictures_m), queue.image])
        text_m = torch.cat([*(towers.embed_text(each) for each in texts), queue.text])
    itc = 0
    for live, own, others in ((image, image_m[:count], text_m), (text, text_m[:count], image_m)):
        soft = (own @ others.T / temperature).detach().softmax(dim=1)
        target = alpha * soft + (1 - alpha) * torch.eye(count, len(others))
        itc = itc + cross_entropy(live @ others.T / temperature, target).mean() / 2

    def weights(live, others):
        found = (live @ others[:count].T / temperature).softmax(dim=1).detach()
        return found.fill_diagonal_(0)

    wrong_text, wrong_image = drawn(weights(image, text_m)), drawn(weights(text, image_m))
    itm = 0
    for i in range(count):
        for a, b, label in ((i, i, 1), (wrong_image[i], i, 0), (i, wrong_text[i], 0)):
            logits = model.match_logits(texts[b], None, pictures[a])
            itm = itm + cross_entropy(logits, torch.eye(2)[[label]]).sum() / (3 * count)
    ids, labels = MASKING(*without_end(batch.ids, batch.mask))
    mlm, hidden = 0, int((labels != IGNORED).sum())
    for i in range(count):
        own = ids[i : i + 1, : texts[i].shape[1]]
        logits = model.mlm_logits(own, None, model.prefill_cross(pictures[i]))[0]
        with torch.no_grad():
            soft = towers.mlm_logits(own, None, towers.prefill_cross(pictures_m[i]))[0].softmax(dim=1)
        for place, label in enumerate(labels[i, : own.shape[1]].tolist()):
            if label != IGNORED:
                target = (1 - alpha) * torch.eye(38)[label] + alpha * soft[place]
                mlm = mlm + cross_entropy(logits[place], target) / hidden
    return {"itc": itc, "itm": itm, "mlm": mlm}


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("filled", [0, 5])
def test_losses_and_gradients_are_those_of_the_formulas(alpha, filled):
    trainer = apart(trained())
    if filled:
        with torch.no_grad():
            trainer.losses(rows(filled, seed=7))
        # Images and texts that are none of the batch's.
        trainer.queue.image_index.add_(100)
        trainer.queue.text_index.add_(100)
    hand = copy.deepcopy(trainer)
    batch = rows(5)
    torch.manual_seed(4)
    expected = by_hand(hand.model, hand.momentum, hand.queue.candidates(), batch, alpha)
    sum(expected.values()).backward()
    torch.manual_seed(4)
    found = trainer.losses(batch, alpha)
    found["loss"].backward()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=2e-5), name
    assert found["loss"].item() == pytest.approx(sum(each.item() for each in expected.values()), abs=5e-5)
    wanted = dict(hand.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=2e-5, rtol=1e-3, msg=name)
    assert all(each.grad is None for each in trainer.momentum.parameters())
    assert trainer.queue.filled == filled + 5


def test_a_momentum_of_its_own_moves_every_tower_and_the_language_head():
    trainer = trained(momentum=0.75)
    before = {name: each.clone() for name, each in trainer.momentum.named_parameters()}
    assert {name.split(".")[0] for name in before} == {
        *("visual_encoder", "text_encoder", "mlm_head", "vision_proj", "text_proj")
    }
    with torch.no_grad():
        for each in trainer.model.parameters():
            each.add_(0.2)
        trainer.model.temperature.fill_(0.9)
    trainer.after_step()
    live = dict(trainer.model.named_parameters())
    for name, each in trainer.momentum.named_parameters():
        assert torch.allclose(each, 0.75 * before[name] + 0.25 * live[name], atol=1e-6), name
    assert trainer.model.temperature.item() == pytest.approx(0.5)


def shared(ranks: Ranks) -> AlbefPretraining:
    """Hides the third token of every text: which are drawn is each rank's own affair."""

    def third(ids, mask):
        chosen = torch.zeros_like(mask)
        chosen[:, 2] = True
        return ids.masked_fill(chosen, 4), ids.masked_fill(~chosen, IGNORED)

    model = build_albef(MICRO_ALBEF)
    return apart(AlbefPretraining(model, third, AlbefObjective(momentum=None, queue_size=0), ranks).train())


def part(some: slice) -> Rows:
    """Some of ROWS texts, padded to the longest of them."""
    whole = rows(ROWS)
    cut = Rows(*(each if each is None else each[some] for each in vars(whole).values()))
    longest = int(cut.mask.sum(dim=1).max())
    return dataclasses.replace(cut, ids=cut.ids[:, :longest], mask=cut.mask[:, :longest])


CASES = {"albef": (shared, part)}


def test_several_ranks_take_the_gradient_of_one(tmp_path):
    found = gradients_of_two_ranks(__name__, tmp_path)["albef"]
    expected = gradients(CASES["albef"])
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, atol=1e-5, rtol=1e-3, msg=name)


def test_hidden_tokens_reach_the_language_head_alone():
    """ITC and ITM read whole texts: what masking draws must not change them."""
    found = []
    for share in (0.2, 0.8):
        trainer = apart(trained(momentum=None, queue_size=0))
        trainer.masking = Masking(4, FIXED, MASKING.continues, share=share)
        torch.manual_seed(1)
        found.append(trainer.losses(rows(5)))
    assert found[0]["itc"].item() == found[1]["itc"].item()
    assert found[0]["itm"].item() == found[1]["itm"].item()
    assert found[0]["mlm"].item() != found[1]["mlm"].item()


def test_each_subset_of_objectives_gives_its_losses():
    for names in (("itc",), ("itm",), ("mlm",), ("itc", "itm"), ("itm", "mlm"), ("itc", "itm", "mlm")):
        trainer = trained(objectives=names)
        found = trainer.losses(rows(), 0.2)
        assert set(names) == {"itc", "itm", "mlm"} & set(found)
        assert found["loss"].item() == pytest.approx(sum(found[name].item() for name in names), abs=1e-5)
        found["loss"].backward()
        given = {name for name, each in trainer.model.named_parameters() if each.grad is not None}
        assert ("mlm_head.bias" in given) == ("mlm" in names)
        assert ("itm_head.weight" in given) == ("itm" in names)
        assert (len(given) < len(list(trainer.model.parameters()))) == trainer.leaves_unused


def test_towers_that_name_no_tokens_carry_nothing_for_it():
    names = [name for name, _ in trained(objectives=("itc", "itm")).momentum.named_parameters()]
    assert not [name for name in names if "crossattention" in name or "mlm_head" in name]


def test_half_precision_keeps_losses_in_fp32():
    trainer = apart(trained()).eval()
    found = []
    for rough in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rough):
            found.append(trainer.losses(rows(), 0.4))
    exact, rough = found
    assert all(value.dtype == torch.float32 for value in rough.values())
    for name in ("itc", "itm", "mlm"):
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_evaluation_moves_nothing():
    trainer = trained().eval()
    before = {name: each.clone() for name, each in trainer.state_dict().items()}
    with torch.no_grad():
        trainer.losses(rows(), 0.4)
    assert all(torch.equal(each, before[name]) for name, each in trainer.state_dict().items())


def test_what_is_trained_is_an_albef_and_needs_a_vocabulary():
    trainer = trained()
    assert set(trainer.model.state_dict()) == set(build_albef(MICRO_ALBEF).state_dict())
    with refused("Masking"):
        AlbefPretraining(build_albef(MICRO_ALBEF))
    with refused("objectives"):
        AlbefObjective(objectives=("itc", "lm"))


def test_64_pairs_are_learned_by_heart():
    count, steps = 64, 50
    corpus = from_images([pairs(count)], size=48)
    tokenizer = Tokenizer.train(corpus.texts, vocab_size=200)
    model = build_albef(albef_preset("tiny", tokenizer.vocab_size))
    named = []
    train(
        AlbefPretraining(model, Masking.of(tokenizer), AlbefObjective(momentum=None, queue_size=0)),
        lambda start: batches(corpus, tokenizer, 32, steps=steps, start_step=start),
        TrainConfig(steps=steps, learning_rate=1e-3, warmup_steps=5, log_every=10),
        on_step=lambda _, values: named.append(values["mlm"]),
        examples=count,
    )
    assert named[-1] < named[0] - 1.0
    model.eval()
    (everything,) = batches(corpus, tokenizer, count, steps=1)
    with torch.inference_mode():
        images = model.embed_image(model.encode_image(everything.pixels))
        similarity = images @ model.embed_text(*without_end(everything.ids, everything.mask)).T
    own = torch.arange(count)
    assert (similarity.argmax(1) == own).float().mean() >= 0.95
    assert (similarity.argmax(0) == own).float().mean() >= 0.95
