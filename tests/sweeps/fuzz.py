"""Hundreds of damages to every kind of file that capfilt reads: `just fuzz`.

    python tests/sweeps/fuzz.py [--damages 300] [--seed 0] [--kinds coco,state]

Two tables are printed. Of files that capfilt wrote: no changed byte may reach who reads the file, nor pass `doctor
--verify`. Of files that others wrote: a damaged file is refused in one line, or read with every row accounted for; nothing
may raise, crash, hang for a minute or take more than the memory allowed. Exits 1 where one of them is not so.

Damages are drawn by `damages.py`, of each kind and number from a seed of its own, so that each can be made again alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa
import pyarrow.parquet as pq

import capfilt
from capfilt import doctor
from capfilt.errors import RunError, UserError
from capfilt.tables.workspace import Workspace
from tests.sweeps.crash import called, in_child, make_world
from tests.sweeps.damages import damage, packed

HANG_SECONDS = 60
OWN_COLUMNS = [
    "refused", "exactly right", "found by doctor", "query refused", "query: rows as they were", "query: other rows",
]  # fmt: skip
ABORTED = "Arrow aborted"
"""pyarrow's RowGroupMetaData.column ends the process where a column's size statistics do not fit it."""
OTHER_COLUMNS = ["refused", "read", "rows", "rows with a failure", ABORTED]
MEMORY = 6 << 30
"""Bytes of address space above those of the process at its start."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: the file to damage, below the kind's own folder.
        judge: (folder) -> what came of reading it: "refused", "read", "right" and other words are counted; one that begins
            with "WRONG" is a fault.
        shape: what the file is made of, if not just bytes; a key of `damages.SHAPES`.
        others: files that may take its place.
    """

    name: str
    file: str
    judge: Callable[[Path], Counter[str]]
    shape: str = ""
    foreign: str = ""


class OfAnotherRun(UserError):
    """A whole file that capfilt wrote, in another's place, which only its reader can tell."""


def refuses(read: Callable[[], object]) -> type[Exception] | None:
    """The error with which a file is refused, if it is."""
    try:
        read()
    except (UserError, RunError) as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of several lines: {error}") from error
        return type(error)
    return None


# -- files that capfilt wrote ------------------------------------------------------------------------------------------------

PARTS, MODELS, TRAINED = "parts", "trainings", "trainings/models/trained"


def make_parts(root: Path, seed: int) -> None:
    """A workspace with parts, whose shards are longer than what a look at their ends reads."""
    from capfilt.tables.contracts import CAPTIONS
    from capfilt.tables.manifest import Counts
    from tests.worlds import image_rows, write_images

    parts, rng = Workspace(root / PARTS), Random(seed)
    rows = [
        {**row, "captions": [rng.randbytes(9).hex()]} for row in image_rows("web", 120, start=1000 * seed)
    ]
    write_images(parts.part("images", "web"), [rows], {"seed": seed})
    captions = parts.part("captions", "captioner")
    mark = captions.begin(CAPTIONS, "test", {"seed": seed})
    texts = [
        {"text_id": rng.randbytes(16).hex(), "image_id": rng.randbytes(16).hex(), "text": rng.randbytes(20).hex(),
         "sample_index": 0, "captioner": "c", "decoding": "greedy", "logprob": -rng.random()}
        for _ in range(1500)
    ]  # fmt: skip
    captions.commit(0, CAPTIONS.table(texts), Counts(1500, 1500), mark, 0.1)
    captions.settle("precision", ("fp32", "bf16")[seed])
    captions.finish()


def make_training(root: Path, seed: int) -> None:
    """A workspace with checkpoints, and a training that never removed its states."""
    import dataclasses

    from capfilt.models import preset
    from capfilt.stages import train, training
    from capfilt.training import state

    def small(name: str, vocabulary: int) -> Any:
        whole = preset("blip", name, vocabulary)
        narrow = {"width": 32, "depth": 1, "heads": 2, "hidden": 64}
        vision, text = (dataclasses.replace(each, **narrow) for each in (whole.vision, whole.text))
        return dataclasses.replace(whole, vision=vision, text=text, embed_dim=16)

    make_world(root / MODELS, True)
    train.preset, training.LOG_EVERY, state.remove = small, 1, lambda _: None
    often = "--steps 3 --batch-size 2 --image-size 32 --save-every 1 --keep-states 2 --keep-best --ema 0.9"
    called(f"pretrain --web web --out trained --preset tiny --seed {seed} {often}", root / MODELS)


def part_reader(table: str, name: str, columns: list[str] | None = None) -> Callable[[Path], pa.Table]:
    def read(place: Path) -> pa.Table:
        part = Workspace(place / PARTS).part(table, name)
        rows = pa.concat_tables(part.tables(columns)).combine_chunks()
        again = [batch for shard in part.shards() for batch in part.batches(shard, columns)]
        assert pa.Table.from_batches(again).combine_chunks() == rows
        return rows

    return read


def checkpoint_reader(name: str) -> Callable[[Path], object]:
    def read(place: Path) -> object:
        from capfilt.models import checkpoint

        return checkpoint.open_any(place / MODELS / name)

    return read


def state_reader(name: str) -> Callable[[Path], object]:
    ours: list[Any] = []

    def read(place: Path) -> object:
        from capfilt.training import state

        values = state.read(place / TRAINED / name)[1]
        ours.append(values["identity"])
        if values["identity"] != ours[0]:
            raise OfAnotherRun("the loop refuses it")
        return values

    return read


def stage_reader(place: Path) -> object:
    """A worker of the stage that goes on with the part."""
    return Workspace(place / PARTS).part("captions", "captioner").settle("precision", "fp32")


def own(
    *readers: Callable[[Path], Any], texts: bool = False, sql: str = ""
) -> Callable[[Path], Counter[str]]:
    """Every reader must refuse the file and doctor must find it; of `texts` beside pictures exact rows are as good."""
    sound: list[Any] = []
    rows: list[Any] = []

    def examined(place: Path) -> list[str]:
        places = (place / PARTS, place / MODELS)
        told = (each for each in places if each.exists() for each in doctor.workspace(str(each), full=True))
        return [line for good, line in told if not good]

    def judge(place: Path) -> Counter[str]:
        lines = examined(place)
        if not sound:
            assert not lines, lines
            sound.extend([*(read(place) for read in readers), None])
            return Counter([asked(place, sql)] if sql else [])
        told = Counter[str]()
        for number, read in enumerate(readers):
            found: list[Any] = []
            if error := refuses(lambda: found.append(read(place))):  # noqa: B023 - called at once
                told["refused"] += 1
                if error is OfAnotherRun:
                    return told
            elif texts and found[0] == sound[number]:
                told["exactly right"] += 1
            else:
                told[f"WRONG: {read.__name__} {number} took it"] += 1
        if sql:
            told[asked(place, sql)] += 1
        told["found by doctor" if lines else "WRONG: doctor did not find it"] += 1
        return told

    def asked(place: Path, sql: str) -> str:
        from capfilt.catalog.query import query

        found: list[Any] = []
        if refuses(lambda: found.append(query(Workspace(place / PARTS), sql).to_pylist())):
            return "query refused"
        if not rows:
            rows.append(found[0])
        return "query: rows as they were" if found[0] == rows[0] else "query: other rows"

    return judge


def own_kinds() -> list[Kind]:
    shard = f"{PARTS}/captions/captioner/00000.parquet"
    pictures = f"{PARTS}/images/web/00000.parquet"
    record = f"{PARTS}/.capfilt/captions/captioner"
    columns = ["image_id", "key", "captions"]
    captions, some = (part_reader("captions", "captioner", chosen) for chosen in (None, ["text"]))
    images, bytes_, texts = (part_reader("images", "web", chosen) for chosen in (None, ["image"], columns))
    beside = own(texts, texts=True, sql=f"SELECT {', '.join(columns)} FROM images ORDER BY ALL")
    kinds = [
        Kind("shard of captions", shard, own(captions, some, sql="SELECT * FROM captions ORDER BY ALL")),
        Kind("shard with pictures", pictures, own(images, bytes_)),
        Kind("the same, read for texts", pictures, beside),
        Kind("manifest", f"{record}/00000.manifest.json", own(captions), "json"),
        Kind("part record", f"{record}/part.json", own(captions), "json"),
        Kind("index", f"{record}/index.json", own(), "json"),
        Kind("precision record", f"{record}/precision.json", own(stage_reader), "json"),
    ]
    for folder, whose in (("models/captioner", "a checkpoint"), ("models/trained/best", "best weights")):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            shape = "json" if file.endswith(".json") else ""
            judge = own(checkpoint_reader(folder))
            kinds.append(Kind(f"{file} of {whose}", f"{MODELS}/{folder}/{file}", judge, shape))
    states = ("state.safetensors", "state-00000002.safetensors")
    return kinds + [
        Kind(f"training's {file}", f"{TRAINED}/{file}", own(state_reader(file))) for file in states
    ]


# -- files that others wrote -------------------------------------------------------------------------------------------------


def run_whole(stage) -> Counter[str]:
    """Run a stage as the executor does; every planned row must be in the part."""
    from capfilt.execution.inline import InlineExecutor
    from capfilt.execution.run import run_shards

    planned = sum(stage.expected_rows(shard) for shard in stage.shards())
    summary = run_shards(stage, InlineExecutor(), quiet=True)
    counts = summary.counts
    assert counts is not None
    counts.check()
    if counts.rows_in != planned or summary.rows_out != planned:
        return Counter({f"WRONG: {planned} rows planned, {counts.rows_in} in, {summary.rows_out} out": 1})
    return Counter({"read": 1, "rows": planned, "rows with a failure": sum(counts.failed.values())})


def others(run: Callable[[Path], Counter[str]]) -> Callable[[Path], Counter[str]]:
    def judge(folder: Path) -> Counter[str]:
        found: list[Counter[str]] = []
        if refuses(lambda: found.append(run(folder))):
            return Counter(refused=1)
        return found[0]

    return judge


def ingest(source: str, **options: Any) -> Callable[[Path], Counter[str]]:
    def run(folder: Path) -> Counter[str]:
        from capfilt.stages.ingest import IngestOptions
        from capfilt.stages.ingest.stage import Ingest

        return run_whole(
            Ingest(
                IngestOptions(source_path=str(folder / source), dataset="x", **options),
                Workspace(folder / "ws"),
            )
        )

    return others(run)


def examples(source: str, **options: Any) -> Callable[[Path], Counter[str]]:
    def run(folder: Path) -> Counter[str]:
        from capfilt.stages.examples import ExamplesOptions
        from capfilt.stages.examples.stage import Examples

        options_ = {
            name: str(folder / value) if name == "annotations" else value for name, value in options.items()
        }
        given = ExamplesOptions(
            source_path=str(folder / source), dataset="x", images=("pictures",), **options_
        )
        return run_whole(Examples(given, Workspace(folder / "ws")))

    return others(run)


def urls(source: str, **options: Any) -> Callable[[Path], Counter[str]]:
    """The list alone: what is fetched is the web's."""

    def run(folder: Path) -> Counter[str]:
        from capfilt.stages.download import DownloadOptions
        from capfilt.stages.download.stage import Download

        given = DownloadOptions(url_list=str(folder / source), number_sample_per_shard=2, **options)
        stage = Download(given, Workspace(folder / "ws"))
        stage.begin()
        slices = [stage.list.read(shard) for shard in stage.shards()]
        planned = sum(stage.expected_rows(shard) for shard in stage.shards())
        for each in slices:
            if (
                len(
                    {
                        len(each.urls),
                        len(each.captions),
                        len(each.faults),
                        *(len(c) for c in each.extra.columns),
                    }
                )
                > 1
            ):
                return Counter({"WRONG: columns of several lengths": 1})
        rows = sum(len(each.urls) for each in slices)
        if rows != planned or rows != stage.list.rows:
            return Counter({f"WRONG: {planned} rows planned, {rows} read": 1})
        return Counter(
            {
                "read": 1,
                "rows": rows,
                "rows with a failure": sum(bool(f) for each in slices for f in each.faults),
            }
        )

    return others(run)


def recipe(folder: Path) -> Counter[str]:
    from capfilt.recipe import dry_run, load_recipe, resolve, show

    _, found = load_recipe(str(folder / "recipe.yaml"))
    steps = resolve(found, ["data=x"])
    show(found, ["data=x"])
    with contextlib.suppress(UserError):
        list(dry_run(steps, Workspace(folder / "ws")))
    return Counter(read=1)


def opened(name: str) -> Callable[[Path], Counter[str]]:
    def run(folder: Path) -> Counter[str]:
        from capfilt.models import checkpoint

        checkpoint.read_config(folder / name)
        checkpoint.open_any(folder / name)
        return Counter(read=1)

    return others(run)


RECIPE = """version: 1
description: a recipe
inputs:
  data: {help: the data, default: x}
stages:
- stage: ingest
  options: {source_path: '${data}/a', dataset: web, limit: 5, splits: [train, val]}
- stage: caption
  name: writes
  together: both
  options: {images: web, top_p: 0.9, seed: 3}
- stage: score
  together: both
  options: {images: web, captions: [captioner], batch_size: 4}
- stage: pretrain
  options: {web: [web], steps: 3, learning_rate: 0.001, augment: false}
"""


NAMES = [f"COCO_val2014_{number:012}.jpg" for number in range(1, 5)]


def make_ingested(place: Path) -> None:
    """A workspace with the pictures that examples are about."""
    from capfilt.tables.ids import image_id
    from tests.worlds import image_rows, write_images

    rows = image_rows("pictures", len(NAMES))
    keyed = [
        {**row, "key": name, "image_id": image_id("pictures", name)}
        for row, name in zip(rows, NAMES, strict=True)
    ]
    write_images(Workspace(place).part("images", "pictures"), [keyed])


def make_others() -> list[tuple[Kind, dict[str, bytes]]]:
    """Every kind with the files of its folder, unpacked."""
    from PIL import Image, features

    from tests.worlds import jpeg

    picture = [jpeg("red", 24, number) for number in range(4)]
    names = NAMES
    beside = {f"images/{name}": data for name, data in zip(names, picture, strict=True)}
    made: list[tuple[Kind, dict[str, bytes]]] = []

    def add(
        name: str,
        file: str,
        judge: Callable[[Path], Counter[str]],
        shape: str,
        data: bytes,
        more: dict[str, bytes] | None = None,
    ) -> None:
        made.append((Kind(name, file, judge, shape), {file: data, **(more or {})}))

    def dumped(value: Any) -> bytes:
        return json.dumps(value).encode()

    def lines(values: list[Any]) -> bytes:
        return b"".join(dumped(each) + b"\n" for each in values)

    def table(**columns: list[Any]) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue()

    def tar(members: dict[str, bytes]) -> bytes:
        import tarfile

        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as file:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return sink.getvalue()

    # Pictures with their texts.
    coco = {
        "info": {"year": 2014}, "licenses": [{"id": 1, "name": "CC BY", "url": "http://l"}],
        "images": [
            {"id": n, "file_name": name, "width": 24, "height": 24, "license": 1, "coco_url": f"http://x/{n}"}
            for n, name in enumerate(names, 1)
        ],
        "annotations": [{"id": 10 + n, "image_id": 1 + n % 4, "caption": f"a red square {n}"} for n in range(6)],
    }  # fmt: skip
    add(
        "COCO captions (json)",
        "captions_val2014.json",
        ingest("captions_val2014.json"),
        "json",
        dumped(coco),
        beside,
    )
    karpathy = {
        "dataset": "coco",
        "images": [
            {
                "filename": name,
                "filepath": "",
                "split": "val",
                "imgid": n,
                "sentids": [n],
                "sentences": [{"raw": f"a red {n}", "tokens": ["a"], "sentid": n, "imgid": n}],
            }
            for n, name in enumerate(names)
        ],
    }
    add("Karpathy split (json)", "dataset.json", ingest("dataset.json"), "json", dumped(karpathy), beside)
    annotated = [
        {"image": name, "caption": [f"red {n}", "a square"], "image_id": f"c_{n}"}
        for n, name in enumerate(names)
    ]
    add(
        "annotation list (json)",
        "list.json",
        ingest("list.json", format="annotation_list"),
        "json",
        dumped(annotated),
        beside,
    )
    add(
        "annotation list (jsonl.gz)",
        "list.jsonl.gz",
        ingest("list.jsonl.gz", format="annotation_list"),
        "lines",
        lines(annotated),
        beside,
    )
    in_folder = {f"folder/{name}": data for name, data in zip(names, picture, strict=True)}
    described = [
        {"file_name": name, "text": f"a red square {n}", "split": "train"} for n, name in enumerate(names)
    ]
    rows = "file_name,text,split\n" + "".join(
        f"{each['file_name']},{each['text']},train\n" for each in described
    )
    add("folder, metadata.csv", "folder/metadata.csv", ingest("folder"), "table", rows.encode(), in_folder)
    add(
        "folder, metadata.jsonl",
        "folder/metadata.jsonl",
        ingest("folder"),
        "lines",
        lines(described),
        in_folder,
    )
    columns = {name: [each[name] for each in described] for name in described[0]}
    add(
        "folder, metadata.parquet",
        "folder/metadata.parquet",
        ingest("folder"),
        "parquet",
        table(**columns),
        in_folder,
    )
    add(
        "folder, a picture's .txt",
        f"folder/{names[0][:-4]}.txt",
        ingest("folder", format="folder"),
        "",
        "a red square é\n".encode(),
        in_folder,
    )
    downloaded = {
        "key": [f"{n:09}" for n in range(4)], "status": ["success"] * 3 + ["failed_to_download"],
        "caption": [f"a red {n}" for n in range(4)],
        "url": [f"http://x/{n}" for n in range(4)], "error_message": [None] * 3 + ["HTTP Error 404"],
        "width": [24] * 4, "height": [24] * 4,
        "original_width": [24] * 4, "original_height": [24] * 4, "sha256": [None] * 4, "exif": ["{}"] * 4,
    }  # fmt: skip
    members = {}
    for n in range(3):
        members |= {
            f"{n:09}.jpg": picture[n],
            f"{n:09}.txt": b"a red",
            f"{n:09}.json": dumped(
                {"key": f"{n:09}", "caption": "a red", "url": "http://x", "width": 24, "sha256": None}
            ),
        }
    inside = table(**downloaded, jpg=[*picture[:3], None])
    add(
        "img2dataset, Parquet beside a tar",
        "out/00000.parquet",
        ingest("out"),
        "parquet",
        table(**downloaded),
        {"out/00000.tar": tar(members)},
    )
    add(
        "img2dataset, the tar beside it",
        "out/00000.tar",
        ingest("out"),
        "tar",
        tar(members),
        {"out/00000.parquet": table(**downloaded)},
    )
    add("img2dataset, pictures in Parquet", "out/00000.parquet", ingest("out"), "parquet", inside)
    add("WebDataset (tar)", "00000.tar", ingest("00000.tar"), "tar", tar(members))
    hub = table(
        image=[{"bytes": each, "path": f"{n}.jpg"} for n, each in enumerate(picture)],
        text=[f"a red {n}" for n in range(4)],
    )
    add(
        "Parquet with pictures and texts", "data/train-00000-of-00001.parquet", ingest("data"), "parquet", hub
    )
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"):
        if kind == "AVIF" and not ("avif" in features.modules and features.check_module("avif")):
            continue
        sink = io.BytesIO()
        Image.open(io.BytesIO(jpeg("green", 48, 7))).save(sink, kind)
        suffix = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())
        add(
            f"picture ({kind})",
            f"folder/a.{suffix}",
            ingest("folder", format="folder"),
            "",
            sink.getvalue(),
            {"folder/b.jpg": picture[0]},
        )

    # Lists of URLs.
    addresses = [f"http://example.org/{n}.jpg" for n in range(5)]
    fields = {"url": addresses, "caption": [f"a text, {n}" for n in range(5)], "license": ["CC"] * 5}
    cells = [fields["url"][n] + "{0}" + f'"a text, {n}"' + "{0}CC" for n in range(5)]
    records = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    whole = {
        "csv": ("table", ("\n".join(["url{0}caption{0}license", *cells]) + "\n").format(",").encode()),
        "tsv": ("table", ("\n".join(["url{0}caption{0}license", *cells]) + "\n").format("\t").encode()),
        "txt": ("table", ("\n".join(addresses) + "\n").encode()),
        "jsonl": ("lines", lines(records)),
        "json": ("json", dumped(records)),
        "parquet": ("parquet", table(**fields)),
    }
    for suffix, (shape, data) in whole.items():
        carried = () if suffix == "txt" else ("license",)
        for end in ("",) if suffix == "parquet" else ("", ".gz", ".zst"):
            add(
                f"URLs ({suffix}{end})",
                f"urls.{suffix}{end}",
                urls(f"urls.{suffix}{end}", save_additional_columns=carried),
                shape,
                data,
            )

    # Questions, statements and labels.
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": n, "image_id": 1 + n % 4, "question": f"what is {n}"} for n in range(5)
        ],
    }
    answered = {
        "annotations": [
            {
                "question_id": n,
                "image_id": 1,
                "multiple_choice_answer": "red",
                "answers": [{"answer": "red", "answer_id": a} for a in range(3)],
            }
            for n in range(5)
        ]
    }
    vqa = examples("questions.json", annotations="answers.json")
    add(
        "VQA v2's questions",
        "questions.json",
        vqa,
        "json",
        dumped(questions),
        {"answers.json": dumped(answered)},
    )
    add(
        "VQA v2's answers",
        "answers.json",
        vqa,
        "json",
        dumped(answered),
        {"questions.json": dumped(questions)},
    )
    nlvr = [
        {"identifier": f"dev-{n}-0-0", "sentence": "both are red", "label": "True", "images": names[:2]}
        for n in range(4)
    ]
    add("NLVR2 (lines)", "dev.json", examples("dev.json"), "lines", lines(nlvr))
    boxes = [
        {
            "sentence": "a tower",
            "label": "true",
            "identifier": f"{n}-0",
            "directory": "5",
            "structured_rep": [[], [], []],
        }
        for n in range(2)
    ]
    add("NLVR (lines)", "dev1.json", examples("dev1.json"), "lines", lines(boxes))
    snli = [
        {
            "Flickr30K_ID": names[n][:-4],
            "pairID": f"{n}#1",
            "gold_label": "neutral",
            "sentence1": "a",
            "sentence2": f"b {n}",
        }
        for n in range(4)
    ]
    add("SNLI-VE (jsonl)", "snli_ve_dev.jsonl", examples("snli_ve_dev.jsonl"), "lines", lines(snli))
    labelled = [
        {"image": name, "question": "what", "answers": ["red", "blue"], "split": "train"} for name in names
    ]
    add("records of answers (json)", "records.json", examples("records.json"), "json", dumped(labelled))
    crepe = {
        str(n): {"filename": name, "caption": "a red", "negative_caption": "a blue"}
        for n, name in enumerate(names)
    }
    add("SugarCrepe (json)", "swap_att.json", examples("swap_att.json"), "json", dumped(crepe))
    add(
        "easy-VQA (json)",
        "easy.json",
        examples("easy.json"),
        "json",
        dumped([[f"what is {n}", "red", 1 + n % 4] for n in range(5)]),
    )
    daquar = "".join(f"what is in the image{n} ?\nred, blue\n" for n in range(1, 5))
    add("DAQUAR (txt)", "qa.train.txt", examples("qa.train.txt"), "table", daquar.encode())

    add("recipe (yaml)", "recipe.yaml", others(recipe), "yaml", RECIPE.encode())
    return made


def make_published(root: Path) -> None:
    """Checkpoints in layouts of others: BLIPs, a CLIP and a ViLT."""
    import dataclasses

    import torch
    import transformers

    from capfilt.data.bpe import BpeTokenizer
    from capfilt.models import checkpoint
    from capfilt.models.export import export
    from tests.models.interop.clips import VIT, sharpened
    from tests.models.interop.reference import saved
    from tests.models.interop.test_layouts import original, save
    from tests.worlds import tiny_vilt

    transformers.utils.logging.disable_progress_bar()
    state, path = original(root / "original", saved(root / "transformers", "filter"))
    save({**state, "temp": torch.tensor(0.03)}, path)
    tokenizer = BpeTokenizer.train(["a photo of a dog", "a dog on a beach"] * 3, 530)
    config = dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, vocab_size=tokenizer.vocab_size))
    checkpoint.save(root / "made" / "clip", sharpened(config), tokenizer)
    tiny_vilt(root / "made" / "vilt")
    for name, layout in (("clip", "openai"), ("clip", "transformers"), ("vilt", "transformers")):
        export(root / "made" / name, layout, root / f"{name} {layout}")
    shutil.rmtree(root / "made")


def published(root: Path) -> list[tuple[Kind, dict[str, bytes]]]:
    """Every file of checkpoints in layouts of others."""
    assert in_child(lambda: make_published(root)) == 0
    made = []
    for layout in sorted(root.iterdir()):
        files = {str(each.relative_to(root)): each.read_bytes() for each in sorted(layout.iterdir())}
        target = next((name for name in files if name.endswith(".pth")), layout.name)
        for file, data in files.items():
            shape = "json" if file.endswith(".json") else ""
            made.append((Kind(f"published, {file}", file, opened(target), shape), {**files, file: data}))
    return made


# -- the runner --------------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What came of a kind's damages."""

    damages: int = 0
    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """A kind of file, to be damaged again and again.

    Attributes:
        folder: what `kind.file` is below.
        whole: its bytes, unpacked.
        foreign: those of a file that may take its place.
        reset: makes the folder what it was.
    """

    kind: Kind
    folder: Path
    whole: bytes
    foreign: bytes | None
    reset: Callable[[], None]

    def done(self, count: int, seed: int) -> Account:
        """Damage it `count` times. A child does it; one that dies or falls silent is followed by another."""
        account, number = Account(), 0
        while number < count:
            ours, theirs = os.pipe()
            child = os.fork()
            if not child:
                os.close(ours)
                self._child(range(number, count), seed, theirs)
            os.close(theirs)
            begun, silent = "", False
            with os.fdopen(ours, "rb", 0) as pipe:
                while True:
                    silent = not select.select([pipe], [], [], HANG_SECONDS)[0]
                    line = b"" if silent else pipe.readline()
                    if not line:
                        break
                    how, told = json.loads(line)
                    if told is None:
                        begun = how
                        continue
                    for each, many in told.items():
                        if each.startswith("WRONG"):
                            account.wrong.append(f"{number}, {how}: {each}")
                        else:
                            account.told[each] += many
                    number, begun = number + 1, ""
            if silent:
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if number < count:
                if not begun:
                    raise SystemExit(f"{self.kind.name}: the file is not read before it is damaged")
                if (
                    self.kind.shape == "parquet"
                    and os.WIFSIGNALED(status)
                    and os.WTERMSIG(status) == signal.SIGABRT
                ):
                    account.told[ABORTED] += 1
                else:
                    what = "hung" if silent else f"ended the process ({os.waitstatus_to_exitcode(status)})"
                    account.wrong.append(f"{number}, {begun}: {what}")
                number += 1
        account.damages = number
        return account

    def _child(self, numbers: range, seed: int, pipe: int) -> NoReturn:
        def say(*message: Any) -> None:
            os.write(pipe, json.dumps(message).encode() + b"\n")

        try:
            warnings.simplefilter("ignore")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            self.reset()
            if "refused" in self.kind.judge(self.folder):
                os._exit(1)
            for number in numbers:
                rng = Random(f"{seed}/{self.kind.name}/{number}")
                how, data = damage(self.kind.file, self.kind.shape, self.whole, self.foreign, rng)
                self.reset()
                (self.folder / self.kind.file).write_bytes(data)
                say(how, None)
                say(how, self._judged())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a fork never returns into its parent's code
            traceback.print_exc()
            os._exit(1)

    def _judged(self) -> Counter[str]:
        try:
            return self.kind.judge(self.folder)
        except BaseException as error:  # noqa: BLE001 - whatever is raised is what is looked for
            steps = reversed(traceback.extract_tb(error.__traceback__))
            places = (
                f" at {Path(each.filename).name}:{each.lineno}"
                for each in steps
                if "/capfilt/" in each.filename
            )
            return Counter([f"WRONG: {type(error).__name__}{next(places, '')}: {str(error)[:200]!r}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--damages", type=int, default=300, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", default="", help="only kinds whose name has one of these words, with commas"
    )
    asked = parser.parse_args()
    words = [word for word in asked.kinds.split(",") if word]

    def chosen(kind: Kind) -> bool:
        return not words or any(word in kind.name for word in words)

    wrong = 0

    def heading(first: str, columns: list[str]) -> None:
        print(
            f"\n| {first} | damages | {' | '.join(columns)} | wrong |\n|{'---|' * (len(columns) + 3)}",
            flush=True,
        )

    def told(kind: Kind, account: Account, columns: list[str]) -> None:
        nonlocal wrong
        cells = [
            str(account.damages),
            *(f"{account.told[name]:,}" for name in columns),
            str(len(account.wrong)),
        ]
        print(f"| {kind.name} | {' | '.join(cells)} |", flush=True)
        for each in account.wrong:
            print(f"    WRONG {kind.name}, {each}", file=sys.stderr, flush=True)
        wrong += len(account.wrong)

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(os.path.realpath(name))
        own_chosen = [kind for kind in own_kinds() if chosen(kind)]
        if own_chosen:
            for number, place in enumerate((scratch / "own", scratch / "other")):
                for part, make in ((PARTS, make_parts), (MODELS, make_training)):
                    if any(kind.file.startswith(part) for kind in own_chosen):
                        assert in_child(partial(make, place, number)) == 0
            heading("file of capfilt's", OWN_COLUMNS)
            for kind in own_chosen:
                path = scratch / "own" / kind.file
                whole, foreign = path.read_bytes(), (scratch / "other" / kind.file).read_bytes()
                reset = partial(path.write_bytes, whole)
                work = Work(kind, scratch / "own", whole, foreign if foreign != whole else None, reset)
                told(kind, work.done(asked.damages, asked.seed), OWN_COLUMNS)
                reset()
        assert in_child(lambda: make_ingested(scratch / "ingested")) == 0
        made = make_others()
        if not words or any(word.startswith("published") for word in words):
            made += published(scratch / "published")
        made = [(kind, files) for kind, files in made if chosen(kind)]
        if made:
            heading("file of others", OTHER_COLUMNS)
        for number, (kind, files) in enumerate(made):
            folder = scratch / f"kind{number}"

            def reset(folder: Path = folder, kind: Kind = kind, files: dict[str, bytes] = files) -> None:
                shutil.rmtree(folder, ignore_errors=True)
                for file, data in files.items():
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(packed(file, data) if file == kind.file else data)
                shutil.copytree(scratch / "ingested", folder / "ws")

            work = Work(kind, folder, files[kind.file], None, reset)
            told(kind, work.done(asked.damages, asked.seed), OTHER_COLUMNS)
            shutil.rmtree(folder)
    print(
        f"\n{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {version('torch')}, "
        f"pyarrow {pa.__version__}, Pillow {version('pillow')}, capfilt {capfilt.__version__}; seed {asked.seed}"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
