"""Catches training that sees the wrong pairs, cannot be continued, or passes off a checkpoint of other options as done."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from capfilt.data import transforms
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.models import build, checkpoint, preset
from capfilt.models.blip.model import PretrainingConfig, retrieval
from capfilt.models.common.ranks import ALONE
from capfilt.stages import sources, training
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.evaluate.stage import Evaluate
from capfilt.stages.registry import stage_command
from capfilt.stages.train import FinetuneCaptioner, FinetuneFilter, Pretrain, Retrain
from capfilt.stages.training_options import (
    FinetuneCaptionerOptions,
    FinetuneFilterOptions,
    PretrainOptions,
    Retrain_blip,
    Retrain_clip,
)
from capfilt.tables.contracts import PAIRS, VERDICTS
from capfilt.tables.ids import file_sha256
from capfilt.tables.manifest import Counts
from capfilt.tables.texts import found_texts
from tests.refusals import refused
from tests.worlds import each_rank, failed_row, image_rows, write_images

FAST = {
    "steps": 2, "batch_size": 4, "preset": "tiny", "vocab_size": 60, "queue_size": 8, "augment": False, "save_every": 1
}  # fmt: skip
TUNE = {"steps": 2, "batch_size": 4, "human": ("human",), "augment": False}


@pytest.fixture
def place(workspace):
    rows = [
        *image_rows("human", 6, source="human", texts=2, split="train"),
        *image_rows("human", 4, source="human", start=10, texts=3, split="test"),
    ]
    write_images(workspace.part("images", "human"), [rows])
    return workspace


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def test_pretraining_sees_training_pairs_and_says_how_often(place):
    options = PretrainOptions(human=("human",), web=("web",), **FAST)
    summary = run(Pretrain(options, place))
    assert summary.figures["steps"] == 2
    directory = place.model("pretrained")
    seen = pq.read_table(directory / "exposures.parquet").to_pylist()
    assert sum(row["exposures"] for row in seen) == 8
    # 6 human images x 2 texts; test images and pictures that are lost or without text are not there, a broken one is unseen.
    assert sum(row["source"] == "human" for row in seen) == 12
    assert sum(row["source"] == "web" for row in seen) == 10
    assert (directory / "log.jsonl").read_text().count("\n") >= 1
    assert not (directory / "state.safetensors").exists()
    assert run(Pretrain(options, place)).done_before == 1
    other = PretrainOptions(human=("human",), web=("web",), **{**FAST, "learning_rate": 1e-5})
    with refused("learning_rate", 0.0003, 1e-05):
        run(Pretrain(other, place))


@pytest.mark.parametrize(
    ("gpus", "settings", "ranks"),
    [
        (0, {}, 1), (1, {}, 1), (8, {}, 8), (6, {}, 4), (8, {"accumulate": 4}, 8), (8, {"batch_size": 6}, 3),
        (8, {"batch_size": 7}, 1), (0, {"ranks": 2}, 2), (8, {"ranks": 2}, 2),
    ],
)  # fmt: skip
def test_a_batch_is_shared_by_as_many_gpus_as_can(place, gpus, settings, ranks):
    """A run that is refused, or that leaves GPUs idle, because they do not divide its batch."""
    stage = Pretrain(PretrainOptions(human=("human",), **{"batch_size": 64, **settings}), place)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert stage.ranks(gpus) == ranks
    idle = [] if "ranks" in settings or gpus <= ranks else [f"{gpus - ranks} of {gpus} GPUs stay idle"]
    assert [str(each.message).split(": ")[1] for each in said] == idle


@pytest.mark.parametrize(
    ("batch", "micro", "gpus", "ranks", "accumulate"),
    [
        (2880, 90, 1, 1, 32), (2880, 90, 8, 8, 4), (2880, 90, 32, 32, 1), (2880, 90, 12, 8, 4), (2880, 90, 64, 32, 1),
        (2400, 75, 8, 8, 4), (64, 90, 8, 1, 1), (1000, 90, 8, 5, 4), (64, 16, 0, 1, 4),
    ],
)  # fmt: skip
def test_a_micro_batch_is_the_same_on_any_number_of_gpus(place, batch, micro, gpus, ranks, accumulate):
    """GPUs that stay idle, or see smaller batches than published, because the micro-batches are counted per rank."""
    stage = Pretrain(PretrainOptions(human=("human",), batch_size=batch, micro_batch=micro), place)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert stage.ranks(gpus) == ranks
    assert (f"{gpus - ranks} of {gpus} GPUs stay idle" in str(said[0].message)) if gpus > ranks else not said
    assert stage._accumulate(ranks) == accumulate
    size, rest = divmod(batch, ranks * accumulate)
    assert not rest
    assert micro / 2 <= size <= micro or size == batch


def test_a_micro_batch_trains_as_the_micro_batches_that_it_makes(place):
    for out, how in (("counted", {"accumulate": 2}), ("sized", {"micro_batch": 2})):
        run(Pretrain(PretrainOptions(human=("human",), out=out, **{**FAST, **how}), place))
    weights = [file_sha256(place.model(out) / "model.safetensors") for out in ("counted", "sized")]
    assert weights[0] == weights[1]


def test_the_same_options_and_seed_give_the_same_weights(place):
    for out in ("a", "b"):
        run(Pretrain(PretrainOptions(human=("human",), out=out, **FAST), place))
    assert file_sha256(place.model("a") / "model.safetensors") == file_sha256(
        place.model("b") / "model.safetensors"
    )


@pytest.mark.parametrize("ends", ["_publish", "remove"])
def test_the_weights_are_safe_before_it_is_written_what_they_saw(place, monkeypatch, ends):
    """A run of weeks that is lost, never says what it saw, or keeps its states for good, because it ends in between."""
    options = PretrainOptions(human=("human",), web=("web",), out="written", **FAST)
    with monkeypatch.context() as broken:
        owner = training if ends == "_publish" else training.state
        broken.setattr(owner, ends, lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run(Pretrain(options, place))
    directory = place.model("written")
    weights = file_sha256(directory / "model.safetensors")
    monkeypatch.setattr(sources, "NAMED", 5)
    assert run(Pretrain(options, place)).done_now == 1
    assert file_sha256(directory / "model.safetensors") == weights
    written = pq.ParquetFile(directory / "exposures.parquet")
    assert [written.metadata.row_group(n).num_rows for n in range(written.num_row_groups)] == [5, 5, 5, 5, 2]
    assert sum(row["exposures"] for row in written.read().to_pylist()) == 8
    assert not (directory / "state.safetensors").exists()
    assert run(Pretrain(options, place)).done_before == 1


def test_a_checkpoint_of_earlier_code_does_not_count_as_done(place, monkeypatch):
    """A finetune whose learning rates were an epoch off, kept for the one that was asked for."""
    options = PretrainOptions(human=("human",), out="earlier", **FAST)
    with monkeypatch.context() as before:
        before.setattr(Pretrain, "version", 1)
        run(Pretrain(options, place))
    with refused("version", "--out"):
        run(Pretrain(options, place))


@pytest.mark.parametrize(
    "changes", [{}, {"augment": True, "flip": True, "randaugment": 1}], ids=["plain", "varied"]
)
def test_streamed_pairs_are_the_held_ones_and_shares_hold_for_both(place, changes):
    """A stream that trains on other rows, in another order or on other crops than a held corpus, or exposures that name the
    wrong texts."""
    write_images(place.part("images", "clean"), [image_rows("clean", 9)])
    found, weights = {}, {}
    for out, how in (
        ("held", {}),
        ("streamed", {"stream": True}),
        ("apart", {"stream": True, "loader_workers": 1}),
    ):
        options = PretrainOptions(
            human=("human",),
            web=("clean",),
            out=out,
            mix=("human=3", "web=1"),
            **{**FAST, "steps": 10, **changes},
            **how,
        )
        stage = Pretrain(options, place)
        summary = run(stage)
        rows = pq.read_table(place.model(out) / "exposures.parquet").to_pylist()
        found[out] = {(row["text_id"], row["image_id"], row["source"], row["exposures"]) for row in rows}
        seen = {
            source: sum(r["exposures"] for r in rows if r["source"] == source) for source in ("human", "web")
        }
        assert sum(seen.values()) == summary.figures["steps"] * 4 == 40
        assert abs(seen["human"] - 30) <= 1
        weights[out] = file_sha256(place.model(out) / "model.safetensors"), stage.fingerprint()
    assert found["held"] == found["streamed"] == found["apart"]
    assert weights["held"] == weights["streamed"] == weights["apart"]


@pytest.mark.parametrize("stream", [False, True], ids=["held", "streamed"])
def test_a_state_belongs_to_any_number_of_ranks_held_or_streamed(place, monkeypatch, stream):
    """A run that is refused because another number of GPUs is free, or goes on with other texts than it would have seen."""
    states, seen = set(), {}

    def train(module, batches, config, *, fingerprint, ranks, **_):
        states.add(fingerprint)
        for step, batch in enumerate(batches(2)):
            seen.setdefault(ranks.world, {}).setdefault(step, []).extend(batch.example.tolist())
        raise MemoryError

    monkeypatch.setattr(training, "train", train)
    for _ in each_rank(monkeypatch):
        options = PretrainOptions(human=("human",), stream=stream, **{**FAST, "steps": 5})
        stage = Pretrain(options, place)
        with pytest.raises(MemoryError):
            stage.run(lambda *_: None)
    assert len(states) == 1
    assert seen[1] == seen[2]
    assert [len(some) for some in seen[1].values()] == [4, 4, 4]


def test_averaged_weights_are_the_checkpoint_and_the_best_and_the_live_ones_lie_beside_it(place):
    """Averages that are computed and thrown away, or a best checkpoint that cannot be loaded."""
    every = {
        **FAST,
        "steps": 4,
        "accumulate": 2,
        "recompute": True,
        "keep_states": 2,
        "momentum_batch_size": 2880,
    }
    run(Pretrain(PretrainOptions(human=("human",), out="plain", **every), place))
    chosen = {**every, "ema": 0.5, "keep_best": True}
    run(Pretrain(PretrainOptions(human=("human",), out="averaged", **chosen), place))
    plain = checkpoint.load(place.model("plain"))[0].state_dict()
    averaged = checkpoint.load(place.model("averaged"))[0].state_dict()
    live = checkpoint.load(place.model("averaged") / "live")[0].state_dict()
    best, _, meta = checkpoint.load(place.model("averaged") / "best")
    assert all(torch.equal(tensor, live[name]) for name, tensor in plain.items())
    assert not torch.equal(averaged["itm_head.weight"], live["itm_head.weight"])
    assert meta["extra"]["step"] in (1, 2, 3, 4)
    if meta["extra"]["step"] == 4:
        assert torch.equal(best.itm_head.weight, averaged["itm_head.weight"])
    assert not list(place.model("plain").glob("state*"))
    assert not list(place.model("averaged").glob("state*"))


def test_finetuning_starts_from_the_checkpoint_and_keeps_its_vocabulary(place):
    run(Pretrain(PretrainOptions(human=("human",), **FAST), place))
    run(FinetuneCaptioner(FinetuneCaptionerOptions(out="writes", **TUNE), place))
    run(FinetuneFilter(FinetuneFilterOptions(out="judges", **TUNE, queue_size=4), place))
    models = {name: checkpoint.load(place.model(name))[0] for name in ("pretrained", "writes", "judges")}
    assert models["writes"].config.prompt == "a picture of "
    before, after = (models[name].itm_head.weight for name in ("pretrained", "writes"))
    assert before.equal(after)  # LM alone leaves the matching head as it was
    assert not before.equal(models["judges"].itm_head.weight)


def test_retraining_takes_pairs_or_verdicts_and_starts_anew_or_goes_on(place):
    pairs = place.part("pairs", "kept")
    rows = [
        {
            "image_id": row["image_id"],
            "image": row["image"],
            "texts": [{"text": row["captions"][0], "source": "synthetic", "itm_score": 0.9, "weight": 1.0}],
        }
        for row in image_rows("web", 5)
    ]
    mark = pairs.begin(PAIRS, "test", {})
    pairs.commit(0, PAIRS.table(rows), Counts(5, 5), mark, 0.0)
    run(Retrain(Retrain_blip(human=("human",), pairs=("kept",), **FAST), place))
    seen = pq.read_table(place.model("retrained") / "exposures.parquet").to_pylist()
    assert sum(row["source"] == "synthetic" for row in seen) == 5
    run(Retrain(Retrain_blip(human=("human",), out="more", init="retrained", **FAST), place))
    first, second = (checkpoint.load(place.model(name))[1] for name in ("retrained", "more"))
    assert first.fingerprint == second.fingerprint
    with refused("--verdicts web", "IMAGES=VERDICTS"):
        Retrain(Retrain_blip(verdicts=("web",), **FAST), place)


@pytest.mark.parametrize("stream", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("randaugment", [0, 2])
def test_pictures_are_cropped_whole_and_once(place, monkeypatch, randaugment, stream):
    """A crop of a crop, or one of a picture that was squashed to a square."""
    rows = image_rows("wide", 6, source="human", texts=2)
    for number, row in enumerate(rows):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row["image"]["bytes"])).resize((60, 20 + number)).save(buffer, "PNG")
        row["image"] = {"bytes": buffer.getvalue(), "path": None}
    write_images(place.part("images", "wide"), [rows])
    seen = []
    whole = transforms.Views.view

    def view(self, picture, *rest):
        seen.append((picture.shape, self.scale, self.operations))
        return whole(self, picture, *rest)

    monkeypatch.setattr(transforms.Views, "view", view)
    augmented = {**FAST, "augment": True, "stream": stream, "randaugment": randaugment}
    run(Pretrain(PretrainOptions(human=("wide",), out=f"cropped{randaugment}", **augmented), place))
    # Read ahead of the model, two steps of four texts.
    assert len(seen) >= 8
    assert {(scale, operations) for _, scale, operations in seen} == {((0.5, 1.0), randaugment)}
    assert {shape for shape, _, _ in seen} <= {(20 + number, 60, 3) for number in range(6)}


@pytest.mark.parametrize("stream", [False, True])
def test_weights_that_cannot_be_are_refused_by_file_and_image(place, stream):
    """A weight that no share of epochs can be, taken for another."""
    pairs = place.part("pairs", "weighted")
    mark = pairs.begin(PAIRS, "test", {})
    images = image_rows("web", 4)
    for shard, weights in enumerate([(1.0, None, 1.0, 1.0), (1.0, 0.25, 1.25, 1.0)]):
        rows = [
            {
                "image_id": row["image_id"],
                "image": row["image"],
                "texts": [
                    {"text": "a", "source": "web", "weight": 1.0},
                    {"text": "b", "source": "web", "weight": weight},
                ],
            }
            for row, weight in zip(images, weights, strict=True)
        ]
        pairs.commit(shard, PAIRS.table(rows), Counts(4, 4), mark, 0.0)
    with refused("weighted", "00001", images[2]["image_id"], "weight 1.25"):
        run(Retrain(Retrain_blip(pairs=("weighted",), stream=stream, out="unheard", **FAST), place))


def test_an_evaluation_has_its_protocol_and_counts(place):
    run(Pretrain(PretrainOptions(human=("human",), **FAST), place))
    choice = {"model": "pretrained", "images": "human", "method": "greedy", "max_new_tokens": 4}
    run(Evaluate(EvaluateOptions(rerank=2, **choice), place))
    result = json.loads((place.path / "runs" / "pretrained.json").read_bytes())
    assert (result["images"], result["texts"]) == (4, 12)
    assert "k = 2" in result["tasks"]["retrieval"]["protocol"]
    assert 0 <= result["metrics"]["tr@1"] <= result["metrics"]["tr@5"] <= 100
    assert len(result["captions"]) == 4
    with refused("images/human", "split val"):
        run(Evaluate(EvaluateOptions(split="val", out="v", **choice), place))


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (Pretrain, PretrainOptions(human=("human",), mix=("human",)), "--mix human SOURCE=WEIGHT"),
        (
            Pretrain,
            PretrainOptions(human=("human",), stream=True, cache_features=True),
            "--stream --cache-features",
        ),
        (
            Pretrain,
            PretrainOptions(human=("human",), loader_workers=2),
            "--loader-workers 2 --stream",
        ),
        (Pretrain, PretrainOptions(), "part"),
        (Pretrain, PretrainOptions(human=("nowhere",)), "nowhere"),
        (Pretrain, PretrainOptions(human=("human",), vocab="none.txt"), "none.txt"),
        (Pretrain, PretrainOptions(human=("human",), batch_size=1), "--batch-size 1"),
        (Pretrain, PretrainOptions(human=("human",), accumulate=40), "--accumulate 40"),
        (
            Pretrain,
            PretrainOptions(human=("human",), micro_batch=8, accumulate=2),
            "--micro-batch 8 --accumulate 2",
        ),
        (Pretrain, PretrainOptions(human=("human",), batch_size=97, micro_batch=90), "--micro-batch 90"),
        (
            Pretrain,
            PretrainOptions(human=("human",), randaugment=2, augment=False),
            "--randaugment --augment",
        ),
        (FinetuneFilter, FinetuneFilterOptions(human=("human",), init="nowhere"), "nowhere"),
        (FinetuneCaptioner, FinetuneCaptionerOptions(init="captioner"), "--human"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(place, stage, options, message):
    before = sorted(str(path) for path in place.path.rglob("*"))
    with refused(message):
        stage(options, place)
    assert sorted(str(path) for path in place.path.rglob("*")) == before


def test_published_settings_resume_exactly_and_reach_the_loop(place):
    """RandAugment from random states that a resume does not restore, or options that stop at the stage."""
    chosen = {
        **FAST, "steps": 4, "augment": True, "randaugment": 2, "flip": True, "crop_scale": 0.2, "decay": "all",
        "schedule": "epoch-decay", "warmup_steps": 2, "clip_norm": 0.0, "multi_positive": False,
    }  # fmt: skip
    options = PretrainOptions(human=("human",), out="parts", **chosen)
    run(Pretrain(dataclasses.replace(options, out="straight"), place))

    def stop(done, _steps, _figures):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pretrain(options, place).run(stop)
    assert (place.model("parts") / "state.safetensors").exists()
    run(Pretrain(options, place))
    weights = {name: file_sha256(place.model(name) / "model.safetensors") for name in ("straight", "parts")}
    assert weights["straight"] == weights["parts"]
    last = json.loads((place.model("parts") / "log.jsonl").read_text().splitlines()[-1])
    # 12 texts are 3 steps of 4, so the fourth is the second epoch's.
    assert last["lr"] == pytest.approx(3e-4 * 0.9)
    for name, value in (("randaugment", 0), ("decay", "matrices"), ("multi_positive", True), ("seed", 1)):
        other = dataclasses.replace(options, out=name, **{name: value})
        run(Pretrain(other, place))
        assert file_sha256(place.model(name) / "model.safetensors") != weights["parts"], name


def test_a_text_side_starts_from_a_bert_directory(place, tmp_path):
    run(Pretrain(PretrainOptions(human=("human",), **FAST), place))
    source, tokenizer, _ = checkpoint.load(place.model("pretrained"))
    directory = tmp_path / "bert"
    directory.mkdir()
    tokenizer.save(directory)
    text = source.config.text
    tensors = {
        name: each.detach().clone()
        for name, each in source.text_encoder.named_parameters()
        if "crossattention" not in name
    }
    words = "embeddings.word_embeddings.weight"
    tensors[words] = tensors[words][:-2].clone()
    save_file(tensors, directory / "model.safetensors")
    geometry = {
        "model_type": "bert", "hidden_size": text.width, "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads, "intermediate_size": text.hidden,
        "max_position_embeddings": text.max_positions, "vocab_size": text.vocab_size - 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(geometry))
    options = PretrainOptions(
        human=("human",), out="b", vocab=str(directory), text_init=str(directory), **FAST
    )
    stage = Pretrain(options, place)
    model, _ = stage.initial(None)
    theirs = source.text_encoder.layers[0].attention.self.query.weight
    assert torch.equal(model.text_encoder.layers[0].attention.self.query.weight, theirs)
    assert torch.equal(model.text_decoder.bert.layers[0].attention.self.query.weight, theirs)
    assert stage.identity()["text_init"] == file_sha256(directory / "model.safetensors")
    with refused("--text-init"):
        Pretrain(dataclasses.replace(options, text_init=str(tmp_path / "none")), place)


def test_finetuning_at_another_size_than_pretraining(place):
    run(Pretrain(PretrainOptions(human=("human",), **FAST), place))
    run(FinetuneCaptioner(FinetuneCaptionerOptions(image_size=64, out="larger", **TUNE), place))
    model = checkpoint.load(place.model("larger"))[0]
    assert model.config.image_size == 64
    assert model.visual_encoder.pos_embed.shape[1] == 65


def test_tensorboard_is_refused_before_the_run_where_it_is_missing_and_written_where_not(place, monkeypatch):
    options = PretrainOptions(human=("human",), tensorboard=True, **FAST)
    run(Pretrain(options, place))
    assert list((place.model("pretrained") / "tensorboard").glob("events.*"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("capfilt[tensorboard]"):
        Pretrain(options, place)


def barren(place, kind):
    """An images part `bad` that gives no training pair."""
    rows = image_rows("bad", 3, split="train")
    for row in rows:
        if kind == "no text":
            row["captions"] = []
        elif kind == "empty texts":
            row["captions"] = ["", "...", "x" * 20_000]
        elif kind == "broken":
            row["image"]["bytes"] = row["image"]["bytes"][:60]
        elif kind == "test":
            row["split"] = "test"
    if kind == "lost":
        rows = [failed_row("bad", "lost")]
    return write_images(place.part("images", "bad"), [[] if kind == "no rows" else rows])


BARREN = {
    "no text": "no_text 3",
    "empty texts": "empty_text 6, too_long 3",
    "lost": "not_found 1",
    "test": "split 3",
    "no rows": "empty",
    "broken": "no_picture 3",
}


@pytest.mark.parametrize("kind", BARREN)
@pytest.mark.parametrize("stream", [False, True], ids=["held", "streamed"])
def test_a_part_that_gives_no_pair_is_refused_by_name(place, kind, stream):
    """Would catch: a training that is silent about a part of which it sees nothing, and of which people believe it did."""
    barren(place, kind)
    given = {"human": ("human",), "stream": stream}
    stages = [
        Pretrain(PretrainOptions(web=("bad",), **given), place),
        Pretrain(PretrainOptions(**{**given, "human": ("human", "bad")}), place),
        FinetuneCaptioner(
            FinetuneCaptionerOptions(init="captioner", **{**given, "human": ("bad", "human")}), place
        ),
        FinetuneFilter(
            FinetuneFilterOptions(init="captioner", **{**given, "human": ("human", "bad")}), place
        ),
        Retrain(Retrain_clip(web=("bad",), **given), place),
    ]
    for stage in stages:
        with refused("images/bad", "training pair", BARREN[kind]):
            stage.source.data(32)
    for kept in (False, True):
        stage = Pretrain(PretrainOptions(**{**given, "web": ("web",) if kept else ()}), place)
        # Of the web one picture is broken, which is found out when it is read.
        assert len(stage.source.data(32)) == 12 + 10 * kept


@pytest.mark.parametrize("stream", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("model", ["blip", "clip", "vilt", "albef"])
def test_a_selection_that_kept_nothing_is_refused_by_name(place, model, stream):
    """Would catch: a retraining on human pairs alone that is taken for one on a corpus."""
    part = place.part("pairs", "none")
    part.commit(0, PAIRS.table([]), Counts(0, 0), part.begin(PAIRS, "test", {}), 0.1)
    images, verdicts = place.part("images", "human"), place.part("verdicts", "none")
    mark = verdicts.begin(VERDICTS, "test", {})
    rows = [
        {
            **{name: row[name] for name in ("text_id", "image_id", "source", "text")},
            "keep": False,
            "reason": "no",
        }
        for row in found_texts(images.read(0)).to_pylist()
    ]
    verdicts.commit(0, VERDICTS.table(rows), Counts(len(rows), 0, {"no": len(rows)}), mark, 0.1)
    command = stage_command(f"retrain-{model}")
    for chosen, named in (
        ({"pairs": ("none",)}, "pairs/none"),
        ({"verdicts": ("human=none",)}, "images/human verdicts/none"),
    ):
        options = command.options(human=("human",), stream=stream, **chosen)
        (path,) = command.classes(options)
        with refused(named, "training pair"):
            command.build(path, options, place).source.data(32)


def test_finetuning_a_filter_asks_for_blips_retrieval_draws():
    # Catches: the stage that does not ask for what the objective offers.
    blip = build(preset("blip", "tiny", 200))
    config = retrieval(blip, None, FinetuneFilterOptions(human=("human",)), ALONE).config
    assert (config.own_negatives, config.negative_floor) == (True, 0.0)
    assert (PretrainingConfig().own_negatives, PretrainingConfig().negative_floor) == (False, 1e-4)
