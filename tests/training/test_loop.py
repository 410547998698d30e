"""Bugs caught here: a resumed run that is not the run it continues; a signal that loses a run; micro-batches that are not
the batch; averages and a best checkpoint of the wrong steps; exposures that miscount; one broken batch that ends a run, or
poisons its weights; a log that lies, doubles lines, or hides a collapsed ITM head.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from capfilt.data.loader import Batch
from capfilt.models import build
from capfilt.models.blip.model import BlipConfig, BlipPretraining, PretrainingConfig
from capfilt.models.clip.model import ClipConfig, ClipTextConfig, ClipTraining, ClipVisionConfig
from capfilt.models.common.objectives import COLLAPSED_ITM
from capfilt.models.common.ranks import Ranks
from capfilt.models.common.task_objectives import TaskTraining
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.training import average, schedule, state
from capfilt.training.loop import MAX_SKIPS, TrainConfig, train
from tests.refusals import failed, refused
from tests.training.spoilt import spoil

MICRO = BlipConfig(
    vision=VisionConfig(16, 8, width=16, depth=1, heads=2, hidden=32),
    text=TextConfig(40, 16, 1, 2, 32, max_positions=16, dropout=0.1, attention_dropout=0.1),
    embed_dim=8,
)
TIMES = {"seconds", "images_per_second"}


def batch(step: int, count: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 38, (count, 6), generator=generator)
    rows = torch.randint(0, 12, (count,), generator=generator)
    return Batch(
        ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        image_index=rows,
        text_index=rows,
        example=rows,
        weight=torch.ones(count),
        sided=torch.zeros(count, dtype=torch.bool),
        texts=[""] * count,
        step=step,
        epoch=0,
        pixels=torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
    )


def batches(start: int = 0, steps: int = 1000):
    return (batch(step) for step in range(start, steps))


def pretraining(seed: int = 0) -> BlipPretraining:
    return BlipPretraining(build(MICRO, seed), PretrainingConfig(queue_size=13))


CONFIG = TrainConfig(steps=9, learning_rate=1e-2, warmup_steps=2, alpha_ramp_steps=5, log_every=2, seed=3)


def lines(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


class Stop(KeyboardInterrupt):
    pass


def stop_at(step: int):
    def on_step(done, _values):
        if done == step:
            raise Stop

    return on_step


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("as_function", [True, False])
@pytest.mark.parametrize("stops", [[1], [4], [2, 3, 7]])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stops, as_function):
    whole = pretraining()
    straight = train(whole, batches, CONFIG, log_path=tmp_path / "whole.jsonl", examples=12)
    for number, stop in enumerate(stops):
        with pytest.raises(Stop):
            train(
                pretraining(seed=number),  # what a state is restored into does not matter
                batches if as_function else batches(),
                CONFIG,
                on_step=stop_at(stop),
                log_path=tmp_path / "parts.jsonl",
                state_path=tmp_path / "state.safetensors",
                examples=12,
            )
    last = pretraining(seed=77)
    resumed = train(
        last,
        batches if as_function else batches(),
        CONFIG,
        log_path=tmp_path / "parts.jsonl",
        state_path=tmp_path / "state.safetensors",
        examples=12,
    )
    assert lines(tmp_path / "parts.jsonl") == lines(tmp_path / "whole.jsonl")
    for (name, a), b in zip(whole.state_dict().items(), last.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.exposures.tolist() == straight.exposures.tolist()
    assert resumed.steps == straight.steps == 9


def test_a_crash_between_saves_repeats_its_steps_but_not_its_log_lines(tmp_path):
    config = dataclasses.replace(CONFIG, save_every=3, log_every=1)
    train(pretraining(), batches, config, log_path=tmp_path / "whole.jsonl")

    def crash(done, _values):
        if done == 5:
            raise OSError("the machine died")

    paths = {"log_path": tmp_path / "log.jsonl", "state_path": tmp_path / "state.safetensors"}
    with pytest.raises(OSError, match="died"):
        train(pretraining(), batches, config, on_step=crash, **paths)
    assert [line["step"] for line in lines(paths["log_path"])] == [1, 2, 3, 4, 5]
    with paths["log_path"].open("a") as log:
        log.write('{"step": 6, "los')
    train(pretraining(), batches, config, **paths)
    assert lines(paths["log_path"]) == lines(tmp_path / "whole.jsonl")


def test_ranks_that_do_not_see_the_same_state_do_not_train_together(tmp_path):
    class Apart(Ranks):
        def stack(self, mine):
            return torch.stack([mine, torch.zeros_like(mine)])  # the other one has found nothing

    options = {"batches": batches, "examples": 12, "state_path": tmp_path / "state.safetensors"}
    train(pretraining(), config=dataclasses.replace(CONFIG, steps=4), **options)
    with failed("(4, 0)"):
        train(pretraining(), config=dataclasses.replace(CONFIG, steps=4), ranks=Apart(), **options)


def test_a_finished_run_does_nothing_when_run_again(tmp_path):
    paths = {"log_path": tmp_path / "log.jsonl", "state_path": tmp_path / "state.safetensors"}
    first_module, second_module = pretraining(), pretraining(seed=5)
    first = train(first_module, batches, CONFIG, **paths)
    log = paths["log_path"].read_text()
    second = train(second_module, batches, CONFIG, **paths)
    assert paths["log_path"].read_text() == log
    assert (second.exposures == first.exposures).all()
    assert second.losses == first.losses
    for a, b in zip(first_module.parameters(), second_module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"learning_rate": 0.5}, "learning_rate"), ({"steps": 10}, "steps")],
)
def test_a_state_of_another_run_is_refused_by_name(tmp_path, change, said):
    path = tmp_path / "state.safetensors"
    train(pretraining(), batches, CONFIG, state_path=path)
    with refused(path, said):
        train(pretraining(), batches, dataclasses.replace(CONFIG, **change), state_path=path)
    with refused("fingerprint"):
        train(pretraining(), batches, CONFIG, state_path=path, fingerprint="other data")
    other = BlipPretraining(build(MICRO), PretrainingConfig(queue_size=14))
    with refused("module"):
        train(other, batches, CONFIG, state_path=path)


def test_sigterm_finishes_the_step_saves_and_is_passed_on(tmp_path):
    received = []

    def on_step(done, _values):
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            train(pretraining(), batches, CONFIG, on_step=on_step, state_path=tmp_path / "state.safetensors")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    resumed = []
    train(
        pretraining(),
        batches,
        CONFIG,
        on_step=lambda done, _values: resumed.append(done),
        state_path=tmp_path / "state.safetensors",
    )
    assert resumed == [5, 6, 7, 8, 9]


def test_a_process_told_to_end_ends_by_the_signal(tmp_path):
    """What a scheduler sees after SIGTERM is a process that died of SIGTERM, with its state saved. On its way it must
    not have imported torch's compiler: four seconds and 80 MB that every small training would pay.
    """
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_loop as t
from pathlib import Path
def on_step(done, values):
    if done == 3:
        assert "torch._dynamo" not in sys.modules
        os.kill(os.getpid(), signal.SIGTERM)
t.train(t.pretraining(), t.batches, t.CONFIG, on_step=on_step, state_path=Path({str(tmp_path / "s.safetensors")!r}))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        timeout=300,
    )
    assert ended.returncode == -signal.SIGTERM
    assert (tmp_path / "s.safetensors").exists()


EVERYTHING = dataclasses.replace(
    CONFIG, steps=11, accumulate=2, ema=0.9, save_every=3, keep_states=2, log_every=1
)


def test_a_process_killed_at_once_and_resumed_gives_the_identical_curve(tmp_path):
    """SIGKILL leaves no chance to save: the run goes on from the last state, with micro-batches, averaged weights, queue
    and momentum towers on, and its loss curve, weights and averages are those of a run that nobody killed.
    """
    whole = pretraining()
    straight = train(whole, batches, EVERYTHING, log_path=tmp_path / "whole.jsonl", examples=12)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_loop as t
from pathlib import Path
def on_step(done, values):
    if done == 8:
        os.kill(os.getpid(), signal.SIGKILL)
place = Path({str(tmp_path)!r})
t.train(t.pretraining(), t.batches, t.EVERYTHING, on_step=on_step, examples=12,
        log_path=place / "parts.jsonl", state_path=place / "state.safetensors")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path / "parts.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]
    last, resumed_at = pretraining(seed=9), []
    resumed = train(
        last,
        batches,
        EVERYTHING,
        on_step=lambda done, _values: resumed_at.append(done),
        log_path=tmp_path / "parts.jsonl",
        state_path=tmp_path / "state.safetensors",
        examples=12,
    )
    assert resumed_at == [7, 8, 9, 10, 11]
    assert lines(tmp_path / "parts.jsonl") == lines(tmp_path / "whole.jsonl")
    for (name, a), b in zip(whole.state_dict().items(), last.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert straight.average.keys() == resumed.average.keys()
    assert all(torch.equal(tensor, resumed.average[name]) for name, tensor in straight.average.items())
    assert resumed.exposures.tolist() == straight.exposures.tolist()


def test_a_state_from_before_an_option_existed_is_continued(tmp_path):
    """An upgrade of capfilt must not cost the run that was interrupted for it."""
    path = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        train(pretraining(), batches, CONFIG, on_step=stop_at(4), state_path=path)
    tensors, values = state.read(path)
    for name in ("accumulate", "ema", "schedule"):
        del values["identity"][name]
    values["progress"]["forgotten"] = 3
    state.write(path, tensors, values)
    done = []
    train(pretraining(), batches, CONFIG, on_step=lambda step, _: done.append(step), state_path=path)
    assert done == [5, 6, 7, 8, 9]
    with refused("accumulate"):
        train(pretraining(), batches, dataclasses.replace(CONFIG, accumulate=5), state_path=path)


def test_the_newest_states_are_kept_and_an_older_one_continues(tmp_path):
    path = tmp_path / "state.safetensors"
    log = tmp_path / "log.jsonl"
    config = dataclasses.replace(CONFIG, save_every=2, keep_states=3, log_every=1)
    train(pretraining(), batches, config, log_path=tmp_path / "whole.jsonl")
    train(pretraining(), batches, config, state_path=path, log_path=log)
    assert [each.name for each in state.kept(path)] == [
        f"state-0000000{step}.safetensors" for step in (6, 8, 9)
    ]
    assert state.read(path)[1]["progress"]["step"] == 9
    state.kept(path)[0].replace(path)
    done = []
    train(
        pretraining(), batches, config, on_step=lambda step, _: done.append(step),
        state_path=path, log_path=log,
    )  # fmt: skip
    assert done == [7, 8, 9]
    assert lines(log) == lines(tmp_path / "whole.jsonl")
    state.remove(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.jsonl", "whole.jsonl"]


# ---------------------------------------------------------------------- micro-batches, averages, the best


class Even(nn.Module):
    """A loss that is a mean over texts, so that a batch in parts must give the whole batch's gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.calls = []

    def after_step(self):
        self.calls.append("after")

    def losses(self, batch, alpha, hardness):
        self.calls.append(len(batch.texts))
        loss = self.linear(batch.ids.float()).square().mean()
        return {"loss": loss, "other": loss.detach() + 1}


@pytest.mark.parametrize(("parts", "sizes"), [(2, [3, 2]), (4, [2, 1, 1, 1]), (9, [1] * 5)])
def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(parts, sizes):
    torch.manual_seed(0)
    whole, divided = Even(), Even()
    divided.load_state_dict(whole.state_dict())
    config = TrainConfig(steps=3, learning_rate=1e-2, warmup_steps=0, clip_norm=0.0)
    seen, other = [], []
    train(whole, batches, config, on_step=lambda _, values: seen.append(values))
    train(
        divided, batches, dataclasses.replace(config, accumulate=parts),
        on_step=lambda _, values: other.append(values),
    )  # fmt: skip
    torch.testing.assert_close(whole.state_dict(), divided.state_dict(), rtol=1e-5, atol=1e-6)
    assert divided.calls == [*sizes, "after"] * 3
    for a, b in zip(seen, other, strict=True):
        assert b == pytest.approx(a, rel=1e-5)


def test_momentum_towers_move_once_per_step_and_a_part_is_contrasted_with_itself_and_the_queue():
    config = dataclasses.replace(CONFIG, steps=1, accumulate=2, learning_rate=1e-9, min_lr=1e-9)
    module = BlipPretraining(build(MICRO), PretrainingConfig(queue_size=13, momentum=0.5))
    with torch.no_grad():
        for parameter in module.model.vision_proj.parameters():
            parameter.add_(1.0)
    before = module.momentum.vision_proj.weight.clone()
    live = module.model.vision_proj.weight.detach().clone()
    train(module, lambda start: (batch(step, count=6) for step in range(start, 9)), config)
    assert torch.allclose(module.momentum.vision_proj.weight, (before + live) / 2)
    assert module.queue.filled == 6

    def first_itc(accumulate, queue_size):
        seen = []
        module = BlipPretraining(build(MICRO), PretrainingConfig(queue_size=queue_size, momentum=None))
        with torch.no_grad():
            module.model.temperature.fill_(0.5)
        unlike = dataclasses.replace(
            batch(0, count=8), image_index=torch.arange(8), text_index=torch.arange(8)
        )
        train(
            module, [unlike], dataclasses.replace(config, accumulate=accumulate),
            on_step=lambda _, values: seen.append(values["itc"]),
        )  # fmt: skip
        return seen[0]

    # Near its start ITC is about the logarithm of the number of candidates: 8, 2, and with the queue 2, 4, 6 and 8.
    assert first_itc(1, 0) == pytest.approx(math.log(8), abs=0.35)
    assert first_itc(4, 0) == pytest.approx(math.log(2), abs=0.35)
    assert first_itc(4, 13) == pytest.approx(sum(math.log(n) for n in (2, 4, 6, 8)) / 4, abs=0.35)


def test_averaged_weights_by_hand():
    torch.manual_seed(0)
    module, seen = Even(), []
    first = module.linear.weight.detach().clone()
    result = train(
        module, batches, TrainConfig(steps=40, learning_rate=1e-2, warmup_steps=0, ema=0.5),
        on_step=lambda *_: seen.append(module.linear.weight.detach().clone()),
    )  # fmt: skip
    expected = first
    for done, weight in enumerate(seen):
        decay = min(0.5, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(result.average["linear.weight"], expected)
    live = module.linear.weight.detach().clone()
    with average.swapped(module, result.average):
        assert torch.equal(module.linear.weight, result.average["linear.weight"])
    assert torch.equal(module.linear.weight, live)
    assert not train(Even(), batches, TrainConfig(steps=1)).average


def test_running_statistics_are_averaged_with_the_weights():
    """Averaged weights that are evaluated with the live ones' statistics, which are of other activations."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.fixed = nn.BatchNorm1d(3).requires_grad_(False)

        def train(self, mode=True):
            super().train(mode)
            self.fixed.eval()
            return self

        def losses(self, batch, alpha, hardness):
            pixels = batch.pixels.float().mean(dim=(2, 3))
            return {"loss": (self.norm(self.fixed(pixels)) ** 2 * torch.arange(3)).mean()}

    module, seen = Normed(), []
    result = train(
        module, batches, TrainConfig(steps=6, learning_rate=1e-2, warmup_steps=0, ema=0.5),
        on_step=lambda *_: seen.append(module.norm.running_var.clone()),
    )  # fmt: skip
    expected = torch.ones(3)
    for done, variance in enumerate(seen):
        decay = min(0.5, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * variance
    torch.testing.assert_close(result.average["norm.running_var"], expected)
    assert "norm.running_mean" in result.average
    assert not any(name.startswith("fixed.") for name in result.average)
    with average.swapped(module, result.average):
        torch.testing.assert_close(module.norm.running_var, expected)
    assert torch.equal(module.norm.running_var, seen[-1])


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_the_averages_warm_up_counts_the_steps_that_were_taken():
    """Counted with the skipped ones, the first weights after a bad start hardly move the average from its initialisation."""
    module = Scripted([math.nan, math.nan, 1.0, math.nan, 1.0])
    seen = []
    result = train(
        module, batches, TrainConfig(steps=5, ema=0.99, learning_rate=0.1, warmup_steps=0),
        on_step=lambda *_: seen.append(module.weight.detach().clone()),
    )  # fmt: skip
    expected = 0.1 * torch.ones(2, 2) + 0.9 * seen[2]
    torch.testing.assert_close(result.average["weight"], expected * 2 / 11 + seen[4] * 9 / 11)


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_a_skipped_step_leaves_the_average_alone():
    module = Scripted([1.0, math.nan, math.nan])
    config = TrainConfig(steps=1, ema=0.5, warmup_steps=0)
    alone = train(Scripted([1.0]), batches, config).average["weight"]
    three = dataclasses.replace(config, steps=3)
    assert torch.equal(train(module, batches, three).average["weight"], alone)


def test_the_best_is_that_of_the_lowest_logged_loss_and_survives_a_resume(tmp_path):
    """Kept from the wrong step, kept with live weights in place of averages, or forgotten by a resume."""
    losses = [5.0, 5.0, 3.0, 3.0, 4.0, 4.0, 1.0, 1.0, 2.0, 2.0]
    config = TrainConfig(steps=10, log_every=2, save_every=2, ema=0.5, learning_rate=1e-3)

    def run(found, **options):
        module = Scripted(losses)
        module.step = options.pop("at", 0)

        def keep(step, loss):
            found.append((step, loss, module.weight.detach().clone()))

        return module, train(module, batches, config, on_best=keep, **options)

    whole = []
    module, _ = run(whole)
    assert [step for step, _, _ in whole] == [2, 4, 8]
    assert whole[0][1] == pytest.approx(5.0, abs=0.02)
    assert not torch.equal(whole[-1][2], module.weight)
    parts = []
    with pytest.raises(Stop):
        run(parts, on_step=stop_at(5), state_path=tmp_path / "state.safetensors")
    run(parts, state_path=tmp_path / "state.safetensors", at=5)
    assert [(step, loss) for step, loss, _ in parts] == [(step, loss) for step, loss, _ in whole]
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(parts, whole, strict=True))


@pytest.mark.parametrize(
    ("how", "settles", "best"),
    [
        ({}, 0, [2]),
        ({"alpha_ramp_steps": 3}, 0, [6, 10]),
        ({"hardness_ramp_steps": 4}, 0, [6, 10]),
        ({}, 6, [8, 10]),
        ({}, 99, [10]),
    ],
)
def test_losses_that_rise_by_construction_are_no_reason_to_keep_the_first(how, settles, best):
    """A best checkpoint from when the queue was nearly empty, or targets still hard: no later loss is ever as low."""
    losses = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 5.0, 5.0, 3.0, 3.0]
    config = TrainConfig(steps=10, log_every=2, save_every=2, learning_rate=1e-9, min_lr=1e-9, **how)

    class Filling(Scripted):
        settled = property(lambda self: self.step >= settles)

    kept = []
    train(Filling(losses), batches, config, on_best=lambda step, _loss: kept.append(step))
    assert kept == best


def test_a_module_has_settled_when_its_queue_is_full():
    module, full = pretraining(), []
    config = TrainConfig(steps=5, save_every=0)
    train(module, batches, config, on_step=lambda *_: full.append(module.settled))
    assert full == [False, False, True, True, True]  # 13 slots, 5 texts a step


# ---------------------------------------------------------------------- what is counted and logged


def test_exposures_count_every_trained_example(tmp_path):
    result = train(pretraining(), batches, dataclasses.replace(CONFIG, steps=6), examples=20)
    expected = torch.zeros(20, dtype=torch.int64)
    for step in range(6):
        for row in batch(step).example.tolist():
            expected[row] += 1
    assert result.exposures.dtype == "int64"
    assert result.exposures.tolist() == expected.tolist()
    unsized = train(pretraining(), batches, dataclasses.replace(CONFIG, steps=6)).exposures
    assert unsized.tolist() == expected[: len(unsized)].tolist()
    assert unsized.sum() == 30


def test_log_lines_are_means_and_the_last_step_is_always_there(tmp_path):
    seen = []
    result = train(
        pretraining(),
        batches,
        dataclasses.replace(CONFIG, log_every=4),
        on_step=lambda done, values: seen.append(dict(values)),
        log_path=tmp_path / "log.jsonl",
    )
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [4, 8, 9]
    wanted = {
        "step",
        "image_cosine",
        "text_cosine",
        "queue_cosine",
        "loss",
        "itc",
        "itm",
        "lm",
        "itm_accuracy",
        "itm_balanced_accuracy",
        "temperature",
        "grad_norm",
    }
    assert wanted | {"lr", "images_per_second", "seconds"} <= set(log[0])
    assert log[1]["itm"] == pytest.approx(sum(values["itm"] for values in seen[4:8]) / 4)
    assert log[2]["lm"] == pytest.approx(seen[8]["lm"])
    assert [v["lr"] for v in seen] == [schedule.learning_rate(s, 9, 1e-2, 1e-6, 2) for s in range(9)]
    assert [v["alpha"] for v in seen] == pytest.approx([0.4 * min(1, s / 5) for s in range(9)])
    assert result.losses["lm"] == log[2]["lm"]
    assert result.losses["loss"] == pytest.approx(
        sum(result.losses[name] for name in ("itc", "itm", "lm")), abs=1e-5
    )


def test_same_seed_same_weights_and_the_callers_random_state_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    modules = []
    for _ in range(2):
        module = pretraining()
        torch.manual_seed(11)
        train(module, batches, CONFIG)
        assert torch.equal(torch.rand(3), expected)
        modules.append(module)
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)
    other = pretraining()
    train(other, batches, dataclasses.replace(CONFIG, seed=4))
    assert any(
        not torch.equal(a, b) for a, b in zip(modules[0].parameters(), other.parameters(), strict=True)
    )


# ---------------------------------------------------------------------- faults


class Scripted(nn.Module):
    """A loss that is what the test says, step by step."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.values = list(values)
        self.step = 0

    def losses(self, batch, alpha, hardness):
        factor = self.values[min(self.step, len(self.values) - 1)]
        self.step += 1
        loss = (self.weight * factor).mean()
        return {"loss": loss, "itm": loss.detach()}


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    module = Scripted([1.0, math.nan, math.inf, 1.0])
    result = train(
        module, batches, TrainConfig(steps=4, log_every=2), log_path=tmp_path / "log.jsonl", examples=12
    )
    assert result.skipped_steps == 2
    assert torch.isfinite(module.weight).all()
    assert result.exposures.sum() == 10
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in log] == [1, 2]
    assert [line["loss"] for line in log] == pytest.approx([1.0, 1.0], abs=0.01), "means over the steps taken"


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(value):
    """A constant that overflows leaves the gradient as it was; log and best checkpoint have no use for such a loss."""

    class Apart(Scripted):
        def losses(self, batch, alpha, hardness):
            found = super().losses(batch, alpha, hardness)
            return {"loss": found["loss"] + (value if batch.step == 1 else 0.0)}

    alone, module = Apart([1.0]), Apart([1.0])
    config = TrainConfig(steps=2, learning_rate=0.1, min_lr=0.1, warmup_steps=0)
    assert train(module, batches, config).skipped_steps == 1
    train(alone, batches, dataclasses.replace(config, steps=1))
    assert torch.equal(module.weight, alone.weight)


def contrast():
    """Without anything random, so that a run with a skipped step can be held against one without the batch."""
    config = dataclasses.replace(
        MICRO, text=dataclasses.replace(MICRO.text, dropout=0.0, attention_dropout=0.0)
    )
    return BlipPretraining(build(config), PretrainingConfig(queue_size=13, momentum=0.5, objectives=("itc",)))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 2)

    def forward(self, pixels):
        return self.linear(self.norm(pixels.float().mean(dim=(2, 3))))


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Normed()

    def losses(self, batch, alpha, hardness):
        return {"loss": self.model(batch.pixels).square().mean()}


class Copied(TaskTraining):
    """A copy in training mode that follows: its statistics move by what it sees, its weights by the model's."""

    def __init__(self):
        super().__init__(Normed(), 0.5)

    def losses(self, batch, alpha, hardness):
        told = self.taught(1.0, lambda model: model(batch.pixels))
        return {"loss": (self.model(batch.pixels) - told - 1).square().mean()}


def clip():
    tower = ClipVisionConfig(32, width=8, heads=4, stages="1-1-1-1")
    return ClipTraining(
        build(ClipConfig(tower, ClipTextConfig(40, 6, 16, 1, 2, 32), embed_dim=8, max_text_tokens=6))
    )


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
@pytest.mark.parametrize(
    ("by", "part", "more"),
    [(math.nan, 0, {}), (math.inf, 1, {"accumulate": 2}), (1e30, 0, {"clip_norm": 0.0})],
)
@pytest.mark.parametrize("make", [contrast, Statistics, Copied])
def test_a_skipped_step_moves_nothing(tmp_path, make, by, part, more):
    """A gradient that is not finite (or too large to have a length) where the loss is: such a step poisoned weights and
    moments. And steps that were skipped for their loss: the queue kept the batch, running statistics were those of broken
    pictures, momentum towers followed weights that had not moved.
    """
    # The same rate and weights of targets whatever the step's number.
    config = TrainConfig(
        steps=5,
        learning_rate=1e-2,
        min_lr=1e-2,
        warmup_steps=0,
        weight_decay=0.1,
        ema=0.9,
        log_every=1,
        save_every=1,
        **more,
    )

    def run(name, bad):
        def given(start):
            steps = iter(range(9))
            for number in range(9):
                made = batch(50 + number if number in bad else next(steps), count=6)
                if number >= start:
                    yield dataclasses.replace(made, step=number)

        path = tmp_path / name
        result = train(
            spoil(make(), bad, by, part),
            given,
            dataclasses.replace(config, steps=3 + len(bad)),
            state_path=path,
            examples=12,
        )
        tensors, _ = state.read(path)
        return result, {name: each for name, each in tensors.items() if not name.startswith("random.")}

    plain, expected = run("plain", [])
    for bad in ([0], [1, 3], [3, 4]):
        result, found = run(f"bad{bad[0]}", bad)
        assert result.skipped_steps == len(bad)
        assert expected.keys() == found.keys()
        for name, each in expected.items():
            assert torch.equal(found[name], each), name
        assert result.exposures.tolist() == plain.exposures.tolist()


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_a_run_resumed_behind_a_skipped_step_is_the_uninterrupted_one(tmp_path):
    """Towers that follow once more because the run does not know that its last step moved nothing."""
    config = dataclasses.replace(CONFIG, steps=5)
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    train(spoil(contrast(), [2]), batches, config, state_path=whole)
    with pytest.raises(Stop):
        train(spoil(contrast(), [2]), batches, config, state_path=parts, on_step=stop_at(3))
    train(spoil(contrast(), [2]), batches, config, state_path=parts)
    for (name, each), other in zip(state.read(whole)[0].items(), state.read(parts)[0].values(), strict=True):
        assert torch.equal(each, other), name


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_broken_pictures_leave_a_resnets_statistics_alone():
    """Running means that are NaN for ever, in the checkpoint and its averages, after one picture of NaN in one step."""
    module = clip()

    def broken(start=0):
        for step in range(start, 1000):
            pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            yield dataclasses.replace(batch(step), pixels=pixels * math.nan if step == 1 else pixels)

    result = train(module, broken, TrainConfig(steps=3, ema=0.9, warmup_steps=0))
    assert result.skipped_steps == 1
    tensors = [*module.state_dict().values(), *result.average.values()]
    assert all(torch.isfinite(each).all() for each in tensors)
    counts = [each for name, each in module.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(each == 2 for each in counts)


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_a_stretch_at_the_prior_has_no_skipped_steps_and_is_not_ended_by_them():
    config = TrainConfig(steps=12, log_every=2, learning_rate=1e-9, min_lr=1e-9, stuck_steps=8)
    values = [COLLAPSED_ITM] * 3 + [math.nan] * 3 + [COLLAPSED_ITM] * 6
    with pytest.warns(RuntimeWarning, match="for 9 steps"):
        warned = train(Scripted(values), batches, config).warnings
    # Of the steps up to 10 seven were taken.
    assert [each.split(":")[0] for each in warned] == ["step 4", "step 12"]


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_a_log_line_of_skipped_steps_alone_has_no_losses(tmp_path):
    train(
        Scripted([math.nan, 1.0]), batches, TrainConfig(steps=2, log_every=1), log_path=tmp_path / "log.jsonl"
    )
    assert "loss" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_a_model_that_is_gone_ends_the_run():
    with failed(f"step {MAX_SKIPS}", "learning_rate"):
        train(Scripted([math.nan]), batches, TrainConfig(steps=100))
    # Not in a row: one finite step starts the count again.
    values = ([math.nan] * (MAX_SKIPS - 1) + [1.0]) * 2
    assert train(Scripted(values), batches, TrainConfig(steps=len(values))).skipped_steps == 2 * (
        MAX_SKIPS - 1
    )


@pytest.mark.filterwarnings("ignore:step .* not finite:RuntimeWarning")
def test_one_broken_batch_does_not_poison_queue_or_towers():
    module = pretraining()

    def broken(start=0):
        for step in range(start, 1000):
            made = batch(step)
            if step == 3:
                made = dataclasses.replace(made, pixels=torch.full((5, 3, 16, 16), math.nan))
            yield made

    result = train(module, broken, dataclasses.replace(CONFIG))
    assert result.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())
    assert math.isfinite(result.losses["loss"])


@pytest.mark.parametrize(("log_every", "prior"), [(1, COLLAPSED_ITM), (7, COLLAPSED_ITM), (20, math.log(2))])
def test_a_collapsed_matching_head_is_said_once_after_so_many_steps_however_often_is_logged(log_every, prior):
    config = TrainConfig(
        steps=260, log_every=log_every, learning_rate=1e-9, min_lr=1e-9, stuck_steps=200, accumulate=1
    )
    with pytest.warns(RuntimeWarning, match=rf"{prior + 0.005:.4f}") as caught:
        result = train(Scripted([prior + 0.005]), batches, config)
    assert len(caught) == 1
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith(f"step {-(-200 // log_every) * log_every}: itm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = dataclasses.replace(config, steps=199)
        assert not train(Scripted([COLLAPSED_ITM]), batches, short).warnings
        assert not train(Scripted([0.5]), batches, config).warnings
        never = dataclasses.replace(config, stuck_steps=0)
        assert not train(Scripted([COLLAPSED_ITM]), batches, never).warnings


def test_a_stretch_at_the_prior_survives_a_resume(tmp_path):
    """Counted from nothing after each resume, a run that is killed every thousand steps would never be warned."""
    config = TrainConfig(steps=30, log_every=5, learning_rate=1e-9, min_lr=1e-9, stuck_steps=25)
    path = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        train(Scripted([COLLAPSED_ITM]), batches, config, on_step=stop_at(17), state_path=path)
    with pytest.warns(RuntimeWarning, match="step 25: itm"):
        train(Scripted([COLLAPSED_ITM]), batches, config, state_path=path)


def test_the_first_step_that_is_not_finite_is_said_with_the_loss_that_was_not():
    with pytest.warns(RuntimeWarning, match="step 2: .*itm, grad_norm") as caught:
        result = train(Scripted([1.0, math.nan, math.nan, 1.0]), batches, TrainConfig(steps=4))
    assert len(caught) == 1
    assert len(result.warnings) == 1


def test_embeddings_that_are_one_point_are_said():
    """A collapsed tower trains on for days with a plausible loss, the logarithm of its candidates."""
    config = TrainConfig(
        steps=12, log_every=3, learning_rate=1e-9, min_lr=1e-9, warmup_steps=0, collapse_steps=9
    )

    def told(collapse):
        module = BlipPretraining(build(MICRO), PretrainingConfig(queue_size=13))
        with torch.no_grad():
            for tower in (module.model, module.momentum):
                tower.text_proj.weight.mul_(1.0 - collapse)
                tower.text_proj.bias.fill_(collapse)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = train(module, batches, config)
        assert [str(each.message) for each in caught if each.category is RuntimeWarning] == list(
            result.warnings
        )
        return result

    collapsed = told(1.0)
    assert [message.split(" has been")[0] for message in collapsed.warnings] == [
        "step 9: text_cosine", "step 9: queue_cosine"
    ]  # fmt: skip
    assert collapsed.losses["text_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert collapsed.losses["queue_cosine"] == pytest.approx(1.0, abs=1e-4)
    fine = told(0.0)
    assert not fine.warnings
    assert fine.losses["text_cosine"] < 0.99


def test_batches_start_again_when_they_end_and_none_is_an_error():
    listed = [batch(step) for step in range(2)]
    result = train(pretraining(), listed, dataclasses.replace(CONFIG, steps=5))
    expected = torch.bincount(torch.cat([listed[step % 2].example for step in range(5)])).tolist()
    assert result.exposures.tolist() == expected
    with failed("2 of 9"):
        train(pretraining(), (each for each in listed), CONFIG)
    with failed("0 of 9"):
        train(pretraining(), [], CONFIG)


def test_wrong_options_are_named():
    for options, said in (
        ({"steps": 0}, "steps"),
        ({"steps": 1, "precision": "fp16"}, "precision"),
        ({"steps": 1, "learning_rate": math.nan}, "learning_rate"),
        ({"steps": 1, "accumulate": 0}, "accumulate"),
        ({"steps": 1, "keep_states": 0}, "keep_states"),
        ({"steps": 1, "ema": 1.0}, "ema"),
    ):
        with refused(said):
            TrainConfig(**options)


def test_half_precision_trains_on_a_cpu_when_asked():
    result = train(pretraining(), batches, dataclasses.replace(CONFIG, steps=2, precision="bf16"))
    assert math.isfinite(result.losses["loss"])


def test_micro_batches_of_one_size_are_one_run_on_any_number_of_ranks():
    """A state of 8 GPUs that 32 refuse, though each forward pass sees as much."""
    few, many = (TrainConfig(steps=1, micro_batch=90, accumulate=each).identity() for each in (4, 1))
    assert few == many != TrainConfig(steps=1, micro_batch=75).identity()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_every_rate_and_decay_is_a_number(value):
    """Catches a run that trains to NaN because one of its figures is: all of them, whatever they are called."""
    floats = [each.name for each in dataclasses.fields(TrainConfig) if isinstance(each.default, float)]
    assert len(floats) >= 9
    for name in floats:
        with refused(name):
            TrainConfig(steps=1, **{name: value})


class Apart(nn.Module):
    """A loss of rows by themselves, their weighted mean."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3 * 16 * 16, 1)

    def losses(self, batch, alpha, hardness):
        each = self.line(batch.pixels.flatten(1).float() / 255).square().squeeze(1)
        return {"loss": (each * batch.weight).sum() / batch.weight.sum().clamp(min=1e-9)}


def test_weights_in_micro_batches_are_those_of_the_step():
    """Catches micro-batches that count by their texts, though one of them has most of the weight."""
    found = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        module = Apart()
        config = TrainConfig(steps=2, learning_rate=1e-2, warmup_steps=1, accumulate=accumulate)
        weight = torch.tensor([1.0, 0.9, 0.0, 0.0, 0.1])
        some = [dataclasses.replace(batch(step), weight=weight) for step in range(2)]
        found.append((train(module, some, config).losses["loss"], module.line.weight.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)
