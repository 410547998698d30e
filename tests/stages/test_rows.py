"""Catches a family that must have captions for pictures alone, pictures for texts alone, or one kind of rows in a step."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from capfilt import models
from capfilt.cli import main
from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.tokenizer import Tokenizer
from capfilt.data.transforms import Views
from capfilt.errors import UserError
from capfilt.models import checkpoint, family_named
from capfilt.stages import training
from capfilt.stages.registry import stage_command
from capfilt.stages.train import Retrain
from capfilt.tables.contracts import CAPTIONS, PAIRS
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.alone import RECORD, use_families
from tests.worlds import each_rank, failed_row, image_rows, write_images

PICTURES, TEXTS = 10, 13
"""Usable ones of the part `web`: two rows lack captions, and one lacks its picture."""


@pytest.fixture
def workspace(tmp_path):
    """Web rows with and without captions and a failed one, in two shards; human pairs; a pairs part; synthetic texts."""
    made = Workspace(tmp_path / "workspace")
    rows = image_rows("web", 10)
    for row in rows[:2]:
        row["captions"] = []
    for row in rows[2:6]:
        row["captions"] = [*row["captions"], "one more"]
    lost = failed_row("web", "lost")
    write_images(made.part("images", "web"), [rows[:6], [*rows[6:], lost]])
    write_images(made.part("images", "human"), [image_rows("human", 8, source="human", texts=2)])
    kept = [
        {
            **{name: row[name] for name in ("image_id", "dataset", "key", "url", "image", "width", "height")},
            "texts": [{"text": "kept", "source": "web", "itm_score": 0.9, "weight": 1.0}],
        }
        for row in rows[:4]
    ]
    part = made.part("pairs", "kept")
    part.commit(0, PAIRS.table(kept), Counts(4, 4, {}, {}), part.begin(PAIRS, "test", {}), 0.01)
    written = [
        {
            "text_id": text_id(row["image_id"], "synthetic", "written", "c", 0), "image_id": row["image_id"],
            "text": "written", "sample_index": 0, "captioner": "c", "decoding": "{}",
        }
        for row in rows[:3]
    ]  # fmt: skip
    part = made.part("captions", "c")
    part.commit(0, CAPTIONS.table(written), Counts(3, 3, {}, {}), part.begin(CAPTIONS, "test", {}), 0.01)
    return made


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    use_families(tmp_path / "site", monkeypatch)
    yield
    models._foreign.cache_clear()


FAST = {
    "preset": "tiny",
    "batch_size": 4,
    "warmup_steps": 1,
    "steps": 6,
    "save_every": 2,
    "learning_rate": 1e-2,
}
INPUTS = {
    "sees": {"images": ("web",)},
    "reads": {"texts": ("web",), "vocab_size": 600},
    "trio": {
        "human": ("human",),
        "images": ("web", "pairs/kept"),
        "texts": ("web", "captions/c"),
        "vocab_size": 600,
    },
}


def stage_of(workspace, family, out="made", **more):
    options = stage_command(f"retrain-{family}").options(**{**FAST, **INPUTS[family], "out": out, **more})
    return Retrain(options, workspace)


def trained(workspace, family, out="made", **more):
    """The bytes of the weights, the checkpoint's figures, and the losses of the first and the last step that are logged."""
    stage = stage_of(workspace, family, out, **more)
    losses = []
    stage.run(lambda step, steps, values: losses.append(values["loss"]) and None)
    made = checkpoint.read_config(stage.output)["extra"]
    return (stage.output / "model.safetensors").read_bytes(), made["figures"], losses


@pytest.mark.parametrize("family", ["sees", "reads", "trio"])
def test_it_trains_through_the_command_line_and_learns(foreign, workspace, family, capsys):
    """Catches a kind of rows that the command has no option for, and an objective that is given another's rows."""
    words = [
        "retrain",
        family,
        "--preset",
        "tiny",
        "--batch-size",
        "4",
        "--steps",
        "30",
        "--warmup-steps",
        "1",
    ]
    for name, value in INPUTS[family].items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", str(one)]
    place = ("-w", str(workspace.path), "--execution", "inline", "-q")
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", "made", *place])
    assert stopped.value.code == 0
    log = [json.loads(line) for line in (workspace.model("made") / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    tokenizer = workspace.model("made") / "tokenizer.json"
    assert tokenizer.exists() == (family != "sees")


def test_rows_that_cannot_be_learned_from_are_counted(foreign, workspace):
    """Catches a failed download among the pictures, a missing caption that costs a picture, or a lost text of either."""
    _, figures, _ = trained(workspace, "sees")
    assert (figures["images"], figures["left_out"]) == (PICTURES, {"not_found": 1})
    _, figures, _ = trained(workspace, "reads")
    # The text of the picture that never came is a text all the same.
    assert (figures["texts"], figures["left_out"]) == (TEXTS, {"no_text": 2})
    _, figures, _ = trained(workspace, "trio")
    assert figures["pairs"] == {"texts": 16, "images": 8, "by_source": {"human": 16}}
    assert figures["images"] == {"images": PICTURES + 4, "by_source": {"kept": 4, "web": PICTURES}}
    assert figures["texts"] == {"texts": TEXTS + 3, "by_source": {"synthetic": 3, "web": TEXTS}}
    assert figures["left_out"] == {"images: not_found": 1, "texts: no_text": 2}


def test_exposures_count_the_rows_of_each_kind(foreign, workspace):
    """Catches counts of one kind that land on another's rows."""
    for family, columns, counts in (
        ("sees", ["text_id", "image_id", "source", "exposures"], [PICTURES]),
        ("trio", ["rows", "text_id", "image_id", "source", "exposures"], [16, PICTURES + 4, TEXTS + 3]),
    ):
        stage = stage_of(workspace, family, family)
        stage.run(lambda *_: None)
        table = pq.read_table(stage.output / "exposures.parquet")
        assert table.column_names == columns
        assert table.num_rows == sum(counts)
        seen = table["exposures"].to_pylist()
        for start, count in zip([0, counts[0], sum(counts[:2])], counts, strict=False):
            # Six steps of four; every row is seen once before any is seen twice more.
            assert sum(seen[start : start + count]) == 24
            assert max(seen[start : start + count]) - min(seen[start : start + count]) <= 1
        assert table["text_id"].null_count == (PICTURES if family == "sees" else PICTURES + 4)


@pytest.mark.parametrize("family", ["sees", "reads", "trio"])
def test_a_killed_training_goes_on_to_the_same_bytes(foreign, workspace, family):
    """Catches a state that forgets where each kind of rows stood."""
    whole, _, _ = trained(workspace, family, "whole")
    stage = stage_of(workspace, family, "killed")

    def kill(step, steps, values):
        if step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        stage.run(kill)
    assert not stage.done()
    stage.run(lambda *_: None)
    assert (stage.output / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("family", ["sees", "reads", "trio"])
def test_held_and_streamed_and_accumulated_rows_are_the_same(foreign, workspace, family):
    """Catches another order or another crop for those who have less memory."""
    held, _, _ = trained(workspace, family, "held")
    streamed, _, _ = trained(workspace, family, "streamed", stream=True)
    assert held == streamed
    apart = trained(workspace, family, "apart", accumulate=2)[2]
    assert apart == pytest.approx(trained(workspace, family, "again", accumulate=1)[2], rel=1e-4)


@pytest.mark.parametrize("family", ["sees", "reads", "trio"])
def test_ranks_share_the_rows_of_every_kind(foreign, workspace, monkeypatch, family):
    """Catches ranks that see the same rows twice, or other rows than one process."""
    seen = {}

    def train(module, batches, config, *, ranks, **_):
        for step, batch in enumerate(batches(1)):
            seen.setdefault(ranks.world, {}).setdefault(step, []).extend(batch.example.tolist())
        raise MemoryError

    monkeypatch.setattr(training, "train", train)
    for _ in each_rank(monkeypatch):
        with pytest.raises(MemoryError):
            stage_of(workspace, family).run(lambda *_: None)
    assert {step: sorted(some) for step, some in seen[1].items()} == {
        step: sorted(some) for step, some in seen[2].items()
    }
    assert len(seen[1]) == 5


def test_pictures_alone_are_those_of_pairs(workspace):
    """Catches crops or pixels that depend on whether there is a text."""
    words = Tokenizer.train(["a red square"], 300)
    web = [PairInput(workspace.part("images", "web"))]
    for views in (None, Views((0.5, 1.0), seed=3)):
        alone = Pairs(web, size=32, rows="images")
        pictures = {}
        for batch in alone.batches(words, PICTURES, steps=1, views=None):
            pictures |= dict(zip(batch.image_index.tolist(), batch.images, strict=True))
        for batch in Pairs(web, size=32).batches(words, 4, steps=3, views=None):
            for key, pixels in zip(batch.image_index.tolist(), batch.images, strict=True):
                assert torch.equal(pictures[key], pixels)
        cropped = [b.images for b in alone.batches(words, 4, steps=3, views=views)]
        again = [
            b.images
            for b in Pairs(web, size=32, rows="images", cache=0).batches(words, 4, steps=3, views=views)
        ]
        assert all(map(torch.equal, cropped, again))


def refused(capsys, workspace, *words):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "-w", str(workspace.path), "--execution", "inline", "-q"])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    return said


def test_what_cannot_be_is_refused_in_one_line(foreign, workspace, capsys):
    """Catches a training on nothing, and an option of another kind of rows that is taken and not used."""
    fast = ("--preset", "tiny", "--steps", "1", "--batch-size", "2")
    assert "--images" in refused(capsys, workspace, "retrain", "sees", *fast)
    assert "--human" in refused(
        capsys, workspace, "retrain", "trio", *fast, "--images", "web", "--texts", "web"
    )
    assert "captions/c" in refused(capsys, workspace, "retrain", "sees", *fast, "--images", "captions/c")
    assert "No such option" in refused(capsys, workspace, "retrain", "sees", *fast, "--human", "human")
    assert "No such option" in refused(
        capsys, workspace, "retrain", "reads", *fast, "--flip", "--texts", "web"
    )
    write_images(workspace.part("images", "lost"), [[failed_row("lost", "a"), failed_row("lost", "b")]])
    said = refused(capsys, workspace, "retrain", "sees", *fast, "--images", "lost")
    assert len(said.splitlines()) == 1
    assert "no training picture" in said
    assert "not_found 2" in said
    rows = [{**row, "captions": []} for row in image_rows("mute", 3)]
    write_images(workspace.part("images", "mute"), [rows])
    said = refused(capsys, workspace, "retrain", "reads", *fast, "--texts", "mute")
    assert "no training text" in said
    assert "no_text 3" in said
    with pytest.raises(UserError, match="--human"):
        stage_command("retrain-sees").options(images=("web",), human=("human",))


def test_a_family_with_rows_that_do_not_fit_is_refused(tmp_path, monkeypatch):
    """Catches a record whose rows nobody reads, or whose tokenizer has no texts to learn from."""
    for wrong, name in (
        ('(IMAGE_ROWS,), ""', '(IMAGE_ROWS,), "wordpiece"'),
        ('(IMAGE_ROWS,), ""', '("sounds",), ""'),
    ):
        site = tmp_path / name[:14].strip("('\"")
        use_families(site, monkeypatch, RECORD.replace(wrong, name))
        with pytest.raises(UserError, match="model family sees: Sees"):
            family_named("sees").check()
    models._foreign.cache_clear()
