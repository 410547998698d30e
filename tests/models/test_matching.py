"""Catches a ViLT whose losses are not the published ones, whose false pictures are true ones, that changes with how it is
shared out, or that does not learn."""

from __future__ import annotations

import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from capfilt.data.loader import Batch
from capfilt.data.tokenizer import Tokenizer
from capfilt.models import build
from capfilt.models.common.masking import Masking
from capfilt.models.vilt.model import (
    ImageTokens,
    MatchingConfig,
    States,
    ViltConfig,
    ViltTextConfig,
    ViltTraining,
    ViltVisionConfig,
    alignment_loss,
    mismatched,
)
from capfilt.models.vilt.tasks import RankingTraining
from capfilt.models.vilt.transport import cosine_cost, transport_plan
from capfilt.training.loop import TrainConfig, train
from tests.refusals import refused
from tests.training.grids import coloured, source

CONFIG = ViltConfig(ViltVisionConfig(16, 8), ViltTextConfig(40, 8), 32, 1, 2, 64, dropout=0.0)
ROWS = 8


def trained(*ranks, **options) -> ViltTraining:
    fixed = torch.arange(40) < 5
    masking = Masking(4, fixed, torch.arange(40) > 30, 0.5, whole_words=True)
    return ViltTraining(build(CONFIG, seed=3), masking, MatchingConfig(**options), *ranks)


def batch_of(rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 40, (ROWS, 6), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3
    ids[1::2, 4], ids[1::2, 5] = 3, 0
    pixels = torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    number = torch.arange(ROWS)
    every = Batch(
        ids, ids > 0, number, number, number, torch.ones(ROWS), number < 0, ["x"] * ROWS, 0, 0, pixels=pixels
    )
    return every._slice(*rows.indices(ROWS)[:2])


def test_the_losses_are_those_of_the_formulas():
    module, batch = trained(alignment=0.3), batch_of()
    torch.manual_seed(11)
    found = module.losses(batch)
    torch.manual_seed(11)
    picture, label, keep = mismatched(batch.image_index, batch.text_index)
    assert keep.all()
    assert label.sum() == ROWS // 2
    hidden_ids, said = module.masking(batch.ids, batch.mask)
    model, itm, wpa, mlm = module.model, [], [], []
    for i in range(ROWS):
        length = int(batch.mask[i].sum())
        image = model.encode_image(batch.pixels[picture[i] : picture[i] + 1])
        states = model.fuse(batch.ids[i : i + 1, :length], None, image)
        itm.append(-model.match_logits(states)[0].log_softmax(0)[label[i]])
        cost = cosine_cost(states.text[:, 1:-1], states.image[:, 1:])
        everything = torch.ones(cost.shape[:2], dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
        sign = 1 if label[i] else -1
        wpa.append(sign * (transport_plan(cost.detach(), *everything) * cost).sum())
        own = model.encode_image(batch.pixels[i : i + 1])
        logits = model.word_logits(model.fuse(hidden_ids[i : i + 1, :length], None, own).text)[0]
        mlm += [
            -logits[place].log_softmax(0)[said[i, place]] for place in range(length) if said[i, place] >= 0
        ]
    expected = {"itm": sum(itm) / ROWS, "wpa": sum(wpa) / ROWS, "mlm": sum(mlm) / len(mlm)}
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each.detach(), atol=1e-5, rtol=1e-5, msg=name)
    total = expected["itm"] + expected["mlm"] + 0.3 * expected["wpa"]
    torch.testing.assert_close(found["loss"], total, atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        for loss in (found["loss"], total)
    ]
    for (name, _), mine, theirs in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=name)
        assert mine.any(), f"{name} learns nothing"


def test_no_false_picture_is_the_same_or_has_the_same_text():
    images = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    texts = torch.tensor([0, 1, 2, 2, 4, 5, 6])
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        picture, label, keep = mismatched(images, texts)
        assert keep.all()
        assert label.sum() == 3
        assert (picture[label == 1] == torch.arange(7)[label == 1]).all()
        for i in torch.nonzero(label == 0).flatten().tolist():
            j = int(picture[i])
            assert images[i] != images[j]
            assert texts[i] != texts[j]
            seen.add((i, j))
    allowed = {(i, j) for i in range(7) for j in range(7) if images[i] != images[j] and texts[i] != texts[j]}
    assert seen == allowed
    _, label, keep = mismatched(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert (keep == (label == 1)).all()


def test_alignment_leaves_out_ends_padding_and_rows_without_a_negative():
    torch.manual_seed(1)
    states = States(torch.randn(3, 5, 8), torch.randn(3, 4, 8))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    there = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1]], dtype=torch.bool)
    image = ImageTokens(states.image, there)
    label = torch.tensor([1, 1, 0])
    found = alignment_loss(states, mask, image, label, torch.tensor([True, True, True]))

    def distance(row: int, words: slice, patches: list[int]) -> torch.Tensor:
        cost = cosine_cost(states.text[row : row + 1, words], states.image[row : row + 1, patches])
        some = torch.ones(cost.shape[:2], dtype=torch.bool), torch.ones(1, len(patches), dtype=torch.bool)
        return (transport_plan(cost, *some) * cost).sum()

    first, third = distance(0, slice(1, 3), [1, 2]), distance(2, slice(1, 4), [3])
    # The second text has no words between its ends.
    torch.testing.assert_close(found, (first - third) / 3)
    without = alignment_loss(states, mask, image, label, torch.tensor([True, True, False]))
    torch.testing.assert_close(without, first / 2)


def test_patches_are_drawn_in_training_only():
    module = trained(max_patches=2)
    seen = []
    encode = module.model.encode_image
    module.model.encode_image = lambda *a, **k: seen.append(k["limit"]) or encode(*a, **k)
    module.losses(batch_of())
    module.eval().losses(batch_of())
    assert seen == [2, 2, 0, 0]


@pytest.mark.parametrize("kind", ["pretraining", "ranking"])
def test_a_step_in_bf16_is_near_one_in_fp32(kind):
    """Dtypes that do not meet, or a head or a loss in bf16: found out on the first GPU."""
    made = {}
    for rough in (False, True):
        module = trained() if kind == "pretraining" else RankingTraining(build(CONFIG, seed=3), 3)
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            found = module.losses(batch_of())
        assert all(each.dtype == torch.float32 for each in found.values())
        found["loss"].backward()
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        assert all(each.dtype == torch.float32 and each.isfinite().all() for each in gradients)
        made[rough] = found["loss"].detach(), torch.cat([each.flatten() for each in gradients])
    (loss, gradient), (rough_loss, rough_gradient) = made[False], made[True]
    torch.testing.assert_close(rough_loss, loss, rtol=2e-2, atol=0)
    assert rough_loss != loss, "autocast should have done something"
    assert torch.cosine_similarity(rough_gradient, gradient, dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_is_the_same_to_the_bit_under_autocast(dtype):
    """Fifty rounds of the transport in bf16, whose eight bits its plan does not survive."""
    torch.manual_seed(1)
    found = []
    text, image = torch.randn(4, 6, 8).to(dtype), torch.randn(4, 9, 8).to(dtype)
    mask, label = torch.ones(4, 6, dtype=torch.bool), torch.tensor([1, 0, 1, 0])
    for rough in (False, True):
        states = States(text.clone().requires_grad_(), image.clone().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            loss = alignment_loss(states, mask, ImageTokens(states.image), label, label == label)
        assert loss.dtype == torch.float32
        loss.backward()
        found.append((loss.detach(), states.text.grad, states.image.grad))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_without_alignment_it_is_not_computed():
    found = trained(alignment=0.0).losses(batch_of())
    assert "wpa" not in found
    torch.testing.assert_close(found["loss"].detach(), found["itm"] + found["mlm"])


@pytest.mark.parametrize("options", [{"alignment": -1.0}, {"alignment": float("nan")}, {"max_patches": -1}])
def test_options_that_cannot_be_are_named(options):
    with refused(next(iter(options))):
        MatchingConfig(**options)


def test_several_ranks_take_means_over_all_their_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.matching_ranks", str(rank), "2", str(port), str(tmp_path)],
            cwd=Path(__file__).resolve().parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert all(process.returncode == 0 for process in started), said
    found = torch.load(tmp_path / "losses.pt", weights_only=True)
    # Each rank draws for its own rows; alone, its losses are means over those, so what they count for is their number.
    sums, counts = {"itm": 0.0, "wpa": 0.0, "mlm": 0.0}, {"itm": 0, "wpa": 0, "mlm": 0}
    for rank, rows in enumerate((slice(0, 5), slice(5, 8))):
        module, part = trained(), batch_of(rows)
        torch.manual_seed(rank)
        made = module.losses(part)
        torch.manual_seed(rank)
        mismatched(part.image_index, part.text_index)
        hidden = int((module.masking(part.ids, part.mask)[1] >= 0).sum())
        for name, count in (("itm", len(part)), ("wpa", len(part)), ("mlm", hidden)):
            sums[name] += made[name] * count
            counts[name] += count
    expected = {name: sums[name] / counts[name] for name in sums}
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, atol=1e-5, rtol=1e-5, msg=name)
    total = expected["itm"] + expected["mlm"] + 0.1 * expected["wpa"]
    torch.testing.assert_close(found["loss"], total, atol=1e-5, rtol=1e-5)


def test_64_pairs_are_learned_by_heart(tmp_path):
    count, steps = 64, 220
    corpus = source(tmp_path / "grids", coloured(count), 24)
    tokenizer = Tokenizer.train(corpus.texts(), vocab_size=200)
    shape = ViltVisionConfig(24, 12), ViltTextConfig(tokenizer.vocab_size, 8, tokenizer.pad_id)
    model = build(ViltConfig(*shape, 64, 2, 4, 128, dropout=0.0, tied=True))
    train(
        ViltTraining(model, Masking.of(tokenizer, 0.5, whole_words=True)),
        partial(step_batches, corpus, tokenizer, steps),
        TrainConfig(steps=steps, learning_rate=4e-3, warmup_steps=10, log_every=10),
        examples=count,
    )
    model.eval()
    (everything,) = corpus.batches(tokenizer, count, steps=1)
    with torch.inference_mode():
        tokens = model.encode_image(everything.pixels).tokens
        scores = [
            model.match_logits(
                model.fuse(
                    everything.ids, everything.mask, ImageTokens(tokens[i : i + 1].expand(count, -1, -1))
                )
            )[:, 1]
            for i in range(count)
        ]
    similarity, own = torch.stack(scores), torch.arange(count)
    assert (similarity.argmax(1) == own).float().mean() >= 0.95
    assert (similarity.argmax(0) == own).float().mean() >= 0.95


def step_batches(corpus, tokenizer, steps, start):
    return corpus.batches(tokenizer, 64, steps=steps, start_step=start)


def test_ranking_is_the_cross_entropy_of_the_own_text_among_others():
    module, batch = RankingTraining(build(CONFIG, seed=3), false_texts=3), batch_of()
    batch.text_index = torch.tensor([0, 1, 2, 2, 4, 5, 6, 7])  # two texts are equal,
    batch.image_index = torch.tensor([0, 1, 2, 3, 4, 4, 6, 7])  # and two are of one picture
    torch.manual_seed(7)
    texts, there = module.drawn(batch.image_index, batch.text_index)
    assert there.all()
    assert all(len(set(row)) == 4 for row in texts.tolist())
    assert 3 not in texts[2].tolist()
    assert 5 not in texts[4].tolist()
    torch.manual_seed(7)
    found = module.losses(batch)
    expected = right = 0.0
    for row, chosen in enumerate(texts.tolist()):
        scores = []
        for text in chosen:
            length = int(batch.mask[text].sum())
            image = module.model.encode_image(batch.pixels[row : row + 1])
            states = module.model.fuse(batch.ids[text : text + 1, :length], None, image)
            scores.append(module.model.match_logits(states)[0, 1])
        expected -= torch.stack(scores).log_softmax(0)[0] / ROWS
        right += float(scores[0] == max(scores)) / ROWS
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    assert float(found["accuracy"]) == pytest.approx(right)


def test_ranking_takes_the_texts_there_are_and_leaves_out_who_has_none():
    module, batch = RankingTraining(build(CONFIG, seed=3)), batch_of(slice(0, 3))
    there = module.drawn(batch.image_index, batch.text_index)[1]
    assert there.sum(dim=1).tolist() == [3, 3, 3]  # itself and both others
    batch.image_index = torch.zeros(3, dtype=torch.int64)
    found = module.losses(batch)
    assert float(found["loss"].detach()) == 0.0
    found["loss"].backward()
    assert all(torch.isfinite(each.grad).all() for each in module.parameters() if each.grad is not None)
