"""A small workspace made by real commits and the real `select`, with the web's texts and pictures in it."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.tables.contracts import CAPTIONS, IMAGES, SCORES
from capfilt.tables.ids import image_id, text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace

SCRIPT = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
STYLE = "</style></title><style>main{display:none}</style>"
OVERRIDE = "photo \u202egpj.exe\u202c of a cat"
NUL = "nul \x00 escape \x1b[31m bell \x07"
HOSTILE = (SCRIPT, STYLE, OVERRIDE, NUL, "']\");-->]]><!-- \u2028 & &amp; &#x3c;")

SHARDS, ROWS = 2, 40


def unit(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=4).digest(), "big") / 2**32


def picture(number: int, format: str = "PNG") -> bytes:
    image = Image.new("RGB", (64, 48), (20 * number % 256, 90, 200 - number))
    ImageDraw.Draw(image).ellipse((12, 8, 44, 40), fill=(255 - number, 5 * number % 256, 60))
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def image_rows(shard: int) -> tuple[list[dict], Counts]:
    rows, failed = [], {}
    for place in range(ROWS):
        number = shard * ROWS + place
        key = f"{number:09d}"
        text = HOSTILE[number] if number < len(HOSTILE) else f"a web text of picture {number}"
        row = {
            "image_id": image_id("web", key),
            "dataset": "web",
            "key": key,
            "url": f"http://example.org/{key}.jpg",
            "source": "web",
            "captions": [text, "click here"] if number % 10 == 0 else [text],
            "status": "success",
            "image": {"bytes": picture(number), "path": None},
            "width": 64,
            "height": 48,
            "pwatermark": 0.25,
        }
        if number == 7:
            row["image"] = {"bytes": b"\xff\xd8\xff not a picture <b>", "path": None}
        if number % 8 == 5:
            failure = "not_found" if number % 16 == 5 else "timeout"
            failed[failure] = failed.get(failure, 0) + 1
            row |= {"status": "failed_to_download", "failure": failure, "image": None}
            row["error_message"] = f"<b>{failure}</b>"
        rows.append(row)
    return rows, Counts(ROWS, ROWS - sum(failed.values()), {}, failed)


def build(path: Path) -> Workspace:
    """Commit images, captions, scores, two rules' verdicts and pairs, checkpoints' logs, runs and a summary."""
    workspace = Workspace(path)
    images = workspace.part("images", "web")
    captions = workspace.part("captions", "captioner")
    scores = workspace.part("scores", "filter")
    mark = images.begin(IMAGES, "download", {"version": 1, "options": {"image_size": 256, "retries": 2}})
    identity = {"version": 1, "images": mark, "options": {"method": "nucleus"}}
    captions_mark = captions.begin(CAPTIONS, "caption", identity)
    scores_mark = scores.begin(SCORES, "score", {"version": 1, "images": mark, "captions": [captions_mark]})
    for shard in range(SHARDS):
        rows, counts = image_rows(shard)
        images.commit(shard, IMAGES.table(rows), counts, mark, 2.0)
        good = [row for row in rows if row["status"] == "success"]
        written = []
        for row in good:
            text = f"synthetic {row['key']}"
            written.append(
                {
                    "text_id": text_id(row["image_id"], "synthetic", text, "captioner", 0),
                    "image_id": row["image_id"],
                    "text": text,
                    "sample_index": 0,
                    "captioner": "captioner",
                    "decoding": "nucleus",
                    "logprob": -3.5,
                }
            )
        captions.commit(shard, CAPTIONS.table(written), Counts(len(good), len(good)), captions_mark, 1.5)
        judged = []
        for row in good:
            for place, text in enumerate(row["captions"]):
                judged.append((text_id(row["image_id"], "web", text, "", place), row["image_id"], 0.6))
        judged += [(row["text_id"], row["image_id"], 1.4) for row in written]
        judged_rows = [
            {
                "text_id": text,
                "image_id": image,
                "itm_score": unit(text) ** (1 / power),
                "itc_score": 0.1 + 0.4 * unit(text, "itc"),
            }
            for text, image, power in judged
        ]
        scores.commit(shard, SCORES.table(judged_rows), Counts(len(judged), len(judged)), scores_mark, 1.0)
    select(workspace, SelectOptions(images="web", captions=("captioner",), out="capfilt"))
    best = SelectOptions(images="web", captions=("captioner",), out="best", by="itc_score", keep_fraction=0.3)
    select(workspace, best)

    for model, steps, keys in (("pretrained", 60, ("itc", "itm", "lm")), ("captioner", 30, ("lm",))):
        directory = path / "models" / model
        directory.mkdir(parents=True)
        lines = [
            {"step": step, "lr": 1e-4, "seconds": step / 10, "loss": 3 * math.exp(-step / 20)}
            | {key: 1 + place + 2 * math.exp(-step / 15) for place, key in enumerate(keys)}
            for step in range(1, steps)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo'
        (directory / "log.jsonl").write_text(text)
        made_from = {"options": {"seed": 0}, "inputs": {"0": mark}}
        extra = {"stage": "pretrain", "fingerprint": f"{model}-mark", "identity": made_from}
        (directory / "config.json").write_text(
            json.dumps({"model_type": "blip", "config": {}, "extra": extra})
        )
    (path / "runs").mkdir()
    metrics = {
        "tr@1": 12.5,
        "ir@1": {"value": 10.25, "low": 9.0, "high": 11.5, "level": 0.95},
        "note": "text",
    }
    (path / "runs" / "retrained.json").write_text(json.dumps({"name": "retrained", "metrics": metrics}))
    (path / "runs" / "torn.json").write_text('{"name": ')
    summary = {
        "noise": 0.41,
        "filter": {"roc_auc": 0.97, "kept_true": 0.9, "dropped_false": 0.95},
        "evaluation": {
            "raw": {"tr@1": 20.0, "ir@1": 15.5, "cider": 40.0},
            "human_only": {"tr@1": 25.0, "ir@1": 17.5, "cider": 50.0},
            "curated": {"tr@1": 31.0, "ir@1": 22.0, "cider": 61.0},
        },
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return workspace


def select(workspace: Workspace, options: SelectOptions) -> None:
    for make in (Select, WritePairs):
        stage = make(options, workspace)
        mark = stage.begin()
        for shard in stage.shards():
            produced = stage.process(shard)
            stage.output.commit(
                shard, produced.table, produced.counts, stage.shard_fingerprint(mark, shard), 0.5
            )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Not to be changed by a test; `build` makes another."""
    return build(tmp_path_factory.mktemp("catalog") / "workspace")


@pytest.fixture(scope="session")
def hostile() -> tuple[str, ...]:
    """The hostile texts of `workspace`: markup, style, direction override, NUL and escapes, ends of everything."""
    return HOSTILE


@pytest.fixture(scope="session")
def builder() -> Callable[[Path], Workspace]:
    """Makes a workspace like `workspace` in a directory."""
    return build


@pytest.fixture
def build_workspace(tmp_path: Path) -> Workspace:
    """One's own workspace, to be changed at will."""
    return build(tmp_path / "workspace")
