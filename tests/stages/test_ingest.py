"""Would catch: a picture that ends the run instead of being a row, bytes changed without need, a turned or oversized
picture stored as it was, splits or texts mixed up on real data, rows that change with the number of shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections import Counter
from dataclasses import replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.catalog.query import print_query
from capfilt.catalog.views import open_catalog
from capfilt.data.images import decode, phash
from capfilt.stages.ingest import IngestOptions
from capfilt.stages.ingest.stage import Ingest
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused


def picture(width=40, height=30, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


GOOD = encoded(picture())
FILES = {
    "good.jpg": (GOOD, None),
    "graphic.png": (encoded(picture(), "PNG"), None),
    "photo.webp": (encoded(picture(), "WEBP"), None),
    "wide.jpg": (encoded(picture(300, 100)), None),
    "turned.jpg": (encoded(picture(), exif=exif(6)), None),
    "upright.jpg": (encoded(picture(), exif=exif(1)), None),
    "old.bmp": (encoded(picture(), "BMP"), None),
    "moving.gif": (encoded(picture(), "GIF"), None),
    "print.tif": (encoded(picture().convert("CMYK"), "TIFF"), None),
    "cut.jpg": (GOOD[: len(GOOD) // 2], "truncated"),
    "page.jpg": (b"<html>" * 50, "not_an_image"),
    "empty.jpg": (b"", "not_an_image"),
    "bomb.png": (encoded(Image.new("1", (9000, 9000)), "PNG"), "too_many_pixels"),
}


def committed(stage):
    """What an executor does, in this process; returns the part."""
    stage = pickle.loads(pickle.dumps(stage))
    mark = stage.begin()
    stage.setup()
    for shard in stage.shards():
        assert stage.expected_rows(shard) > 0
        if stage.output.manifest(shard) is None:
            out = stage.process(shard)
            mark_ = stage.shard_fingerprint(mark, shard)
            stage.output.commit(shard, out.table, out.counts, mark_, 1.0, stats=out.stats)
    return stage.output


def run(stage):
    """What an executor does, in this process; returns the rows, in order."""
    return pa.concat_tables(committed(stage).tables()).to_pylist()


def make(tmp_path, path, **options):
    options = {"dataset": "set", **options}
    return Ingest(IngestOptions(source_path=str(path), **options), Workspace(tmp_path / "ws"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "good.txt").write_text("a good one\n")
    os.mkfifo(folder / "pipe.jpg")
    return folder


def test_every_picture_is_the_row_it_should_be(tmp_path, folder):
    stage = make(tmp_path, folder, max_pixels=1_000_000, shard_size=5)
    rows = {row["key"]: row for row in run(stage)}
    expected = {name: failure for name, (_, failure) in FILES.items()} | {"pipe.jpg": "file_missing"}
    assert {key: row["failure"] for key, row in rows.items()} == expected
    assert list(rows) == sorted(expected)
    counts = stage.output.counts()
    assert (counts.rows_in, counts.kept) == (14, 9)
    assert counts.failed == dict(Counter(failure for failure in expected.values() if failure))
    for key, row in rows.items():
        good = row["failure"] is None
        assert row["status"] == ("success" if good else "failed_to_resize")
        assert good == (row["image"] is not None) == (row["error_message"] is None)
        assert row["image_id"] == image_id("set", key)
        assert row["source"] == "human"
        if key != "pipe.jpg":
            assert row["sha256"] == hashlib.sha256(FILES[key][0]).hexdigest()
        if good:
            stored = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert stored.size == (row["width"], row["height"])
            assert (row["original_width"], row["original_height"]) == Image.open(
                io.BytesIO(FILES[key][0])
            ).size
            original = decode(FILES[key][0])
            assert row["phash"] == phash(original)
            assert (
                np.abs(np.asarray(decode(row["image"]["bytes"]), int) - np.asarray(original, int)).mean() < 3
            )
    for key in ("good.jpg", "graphic.png", "photo.webp", "wide.jpg", "upright.jpg"):
        assert rows[key]["image"]["bytes"] == FILES[key][0]
    assert (rows["turned.jpg"]["width"], rows["turned.jpg"]["height"]) == (30, 40)
    assert rows["good.jpg"]["captions"] == ["a good one"]
    for table in stage.output.tables():
        IMAGES.conform(table)


def test_large_pictures_are_shrunk_and_others_left_alone(tmp_path, folder):
    rows = {row["key"]: row for row in run(make(tmp_path, folder, max_side=64, max_pixels=1_000_000))}
    wide = rows["wide.jpg"]
    assert (wide["width"], wide["height"], wide["original_width"]) == (64, 21, 300)
    assert Image.open(io.BytesIO(wide["image"]["bytes"])).size == (64, 21)
    assert wide["phash"] == phash(decode(FILES["wide.jpg"][0]))
    assert rows["good.jpg"]["image"]["bytes"] == GOOD


def test_rows_do_not_depend_on_the_shards_and_a_second_run_does_nothing(tmp_path, folder):
    first = run(make(tmp_path, folder, max_pixels=1_000_000))
    second = run(make(tmp_path / "other", folder, max_pixels=1_000_000, shard_size=3))
    assert first == second
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "ws").rglob("*")}
    assert run(make(tmp_path, folder, max_pixels=1_000_000)) == first
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "ws").rglob("*")}


def test_changed_bytes_change_the_shard_and_changed_names_the_part(tmp_path, folder):
    stage = make(tmp_path, folder)
    before = stage.shard_fingerprint("mark", 0)
    stage.process(0)
    assert stage.shard_fingerprint("mark", 0) == before
    assert pickle.loads(pickle.dumps(make(tmp_path, folder))).shard_fingerprint("mark", 0) == before
    (folder / "good.jpg").write_bytes(GOOD[:-1] + b"x")
    assert make(tmp_path, folder).shard_fingerprint("mark", 0) != before
    (folder / "good.jpg").write_bytes(GOOD)
    (folder / "good.txt").write_text("another text")
    assert make(tmp_path, folder).shard_fingerprint("mark", 0) != before
    stage.begin()
    (folder / "new.jpg").write_bytes(GOOD)
    with refused("identity"):
        make(tmp_path, folder).begin()


def test_datasets_with_the_same_keys_do_not_collide(tmp_path, folder):
    rows = run(make(tmp_path, folder, dataset="one")) + run(make(tmp_path, folder, dataset="two"))
    assert len({row["image_id"] for row in rows}) == len(rows) == 28


def test_columns_come_along_with_one_type(tmp_path, folder):
    records = [
        {"file_name": name, "n": None if i < 8 else i, "who": "x"} for i, name in enumerate(sorted(FILES))
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stage = make(tmp_path, folder, save_additional_columns=("n", "who"), caption_col=("",), shard_size=5)
    rows = run(stage)
    assert [row["n"] for row in rows] == [*(record["n"] for record in records), None]
    assert {table.schema.field("n").type for table in stage.output.tables()} == {pa.int64()}


def test_what_download_failed_at_elsewhere_stays_told(tmp_path):
    source = tmp_path / "out"
    source.mkdir()
    records = [
        {"key": "0", "url": "u", "caption": "c", "status": "success", "error_message": None, "jpg": GOOD},
        {
            "key": "1",
            "url": "v",
            "caption": "d",
            "status": "failed_to_download",
            "error_message": "HTTP Error 404: no",
            "jpg": None,
        },
        {
            "key": "2",
            "url": "w",
            "caption": "e",
            "status": "success",
            "error_message": None,
            "jpg": GOOD[:99],
        },
    ]
    pq.write_table(pa.Table.from_pylist(records), source / "00000.parquet")
    rows = run(make(tmp_path, source, source="web"))
    assert [(row["key"], row["url"], row["status"], row["failure"]) for row in rows] == [
        ("0", "u", "success", None),
        ("1", "v", "failed_to_download", "not_found"),
        ("2", "w", "failed_to_resize", "truncated"),
    ]
    assert [row["source"] for row in rows] == ["web"] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_path": "nowhere"}, "nowhere"),
        ({"source_path": ""}, "SOURCE_PATH"),
        ({"dataset": ""}, "--dataset ''"),
        ({"dataset": "a/b"}, "--dataset 'a/b'"),
        ({"format": "zip"}, "--format 'zip'"),
        ({"source": "synthetic"}, "--source 'synthetic'"),
        ({"split": "dev"}, "--split 'dev'"),
        ({"splits": ("all",)}, "--splits 'all'"),
        ({"limit": -1}, "--limit"),
        ({"shard_size": 0}, "--shard-size"),
        ({"images": "nowhere"}, "--images nowhere"),
        ({"save_additional_columns": ("status",)}, "column status"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(tmp_path, folder, change, words):
    options = IngestOptions(source_path=str(folder), dataset="set")
    with refused(words):
        Ingest(replace(options, **change), Workspace(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()


def test_a_broken_annotation_file_writes_nothing(tmp_path):
    path = tmp_path / "captions.json"
    for content in ('{"images": [', '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}'):
        path.write_text(content)
        with refused(path):
            make(tmp_path, path, format="coco").begin()
        assert not (tmp_path / "ws").exists()


# -- real data ------------------------------------------------------------------------------------------------------


def test_the_clean_set_comes_in_with_its_splits_and_texts(tmp_path, shared_data):
    path = shared_data / "clean" / "captions.json"
    data = json.loads(path.read_text())
    stage = make(tmp_path, path, splits=("test",), save_additional_columns=("source_id",))
    assert sum(stage.expected_rows(shard) for shard in stage.shards()) == 841
    assert len(make(tmp_path, path).shards()) == 8  # 7,215 rows
    rows = run(
        make(
            tmp_path, path, splits=("test",), save_additional_columns=("source_id",), limit=60, shard_size=50
        )
    )
    wanted = [image for image in data["images"] if image["split"] == "test"][:60]
    assert [row["key"] for row in rows] == [image["file_name"] for image in wanted]
    texts = {}
    for annotation in data["annotations"]:
        texts.setdefault(annotation["image_id"], []).append(annotation["caption"])
    assert [row["captions"] for row in rows] == [texts[image["id"]] for image in wanted]
    assert {(row["status"], row["split"]) for row in rows} == {("success", "test")}
    for row in rows:
        assert row["image"]["bytes"] == (path.parent / "images" / row["key"]).read_bytes()
        assert row["source_id"] == row["key"].partition("_")[0]


def test_the_web_pairs_come_in_with_both_texts(tmp_path, shared_data):
    path = shared_data / "web" / "pairs.parquet"
    stage = make(
        tmp_path,
        path,
        source="web",
        caption_col=("alt_text", "figure_caption"),
        limit=40,
        save_additional_columns=("page",),
    )
    rows = run(stage)
    table = pq.read_table(path).to_pylist()
    expected: dict[str, list[str]] = {}
    for record in table:
        expected.setdefault(record["file_name"], []).extend(
            t for t in (record["alt_text"], record["figure_caption"]) if t
        )
    assert {row["key"]: row["captions"] for row in rows} == dict(list(expected.items())[:40])
    assert {row["status"] for row in rows} == {"success"}
    assert {row["source"] for row in rows} == {"web"}
    assert all(row["page"] and row["license"] for row in rows)
    whole = make(tmp_path, path, source="web", caption_col=("alt_text",))
    assert sum(whole.expected_rows(shard) for shard in whole.shards()) == 2421


def test_the_part_opens_as_a_dataset_of_pictures(tmp_path, folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stage = make(tmp_path, folder, max_pixels=1_000_000)
    run(stage)
    loaded = datasets.load_dataset(
        "parquet",
        data_files=[str(path) for path in stage.output.path.glob("*.parquet")],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    pictures = [row["image"] for row in loaded]
    assert sum(image is not None for image in pictures) == 9
    assert all(image is None or image.size[0] > 0 for image in pictures)


def seen_otherwise() -> dict[str, bytes]:
    """Pictures that other readers show otherwise than capfilt sees them."""
    rgb = picture()
    deep = Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16))
    layered = rgb.convert("RGBA")
    layered.putalpha(Image.linear_gradient("L").resize(rgb.size))
    return {
        "16bit.png": encoded(deep, "PNG"),
        "alpha.png": encoded(layered, "PNG"),
        "alpha.webp": encoded(layered, "WEBP", lossless=True),
        "grey-alpha.png": encoded(layered.convert("LA"), "PNG"),
        "palette.png": encoded(rgb.convert("P"), "PNG"),
        "clear-palette.png": encoded(rgb.convert("P"), "PNG", transparency=0),
        "clear.png": encoded(Image.new("RGB", (40, 30), (0, 0, 9)), "PNG", transparency=(0, 0, 9)),
        "clear-grey.png": encoded(Image.new("L", (40, 30), 7), "PNG", transparency=7),
        "bit.png": encoded(rgb.convert("1"), "PNG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "float.tif": encoded(rgb.convert("F"), "TIFF"),
        "alpha.avif": encoded(layered, "AVIF"),
        "16bit.jp2": encoded(deep, "JPEG2000"),
        "deep.pgm": encoded(deep, "PPM"),
    }


def test_what_is_stored_shows_what_the_models_see(tmp_path):
    """Catches: `load_dataset` showing a black 16-bit picture, or a transparent one on black, that the filter saw otherwise."""
    files = seen_otherwise()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for row in run(make(tmp_path, folder, caption_col=("",))):
        name = row["key"]
        stored = Image.open(io.BytesIO(row["image"]["bytes"]))
        stored.load()
        assert (stored.mode, "transparency" in stored.info) == ("RGB", False), name
        seen = np.asarray(decode(files[name]), int)
        difference = np.abs(np.asarray(stored, int) - seen)
        assert difference.max() == 0 if name.endswith(".png") else difference.mean() < 3, name
        assert row["sha256"] == hashlib.sha256(files[name]).hexdigest()
        assert row["phash"] == phash(decode(files[name]))
        assert row["image"]["path"].endswith(".png" if name.endswith(".png") else ".jpg")


def test_an_ingest_says_how_many_texts_there_are_and_what_is_left_out(tmp_path, folder):
    (folder / "notes.md").write_text("x")
    stage = make(tmp_path, folder, max_pixels=1_000_000, shard_size=4)
    run(stage)
    assert stage.remarks() == ["9 images, 1 texts", "not read: 1 .md"]
    (folder / "good.txt").unlink()
    stage = make(tmp_path, folder, dataset="none", limit=5)
    run(stage)
    assert stage.remarks()[1].startswith("no image has a text: no .txt beside it")
    stage = make(tmp_path, folder, dataset="wanted", limit=5, caption_col=("",))
    run(stage)
    assert stage.remarks() == ["2 images, 0 texts", "not read: 1 .md"]


def test_image_ids_are_unique_whatever_a_source_numbers_anew(tmp_path):
    for name in ("0.parquet", "1.parquet", "10.parquet"):
        pq.write_table(
            pa.table({"key": ["1", "10", "11"], "jpg": [GOOD] * 3, "caption": ["a"] * 3}), tmp_path / name
        )
    rows = run(make(tmp_path, tmp_path))
    assert len({row["image_id"] for row in rows}) == 9


def described(tmp_path, sql):
    """Types and text of the rows of a query over the workspace."""
    with open_catalog(Workspace(tmp_path / "ws")) as connection:
        return connection.execute(sql).fetchall()


def test_every_column_that_duckdb_writes_is_carried(tmp_path):
    """Would catch: a file of DuckDB's that ends the run, because a date in it is infinite or Arrow cannot read a list."""
    file = tmp_path / "all.parquet"
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE pictures AS SELECT ?::BLOB AS jpg, 'a' AS caption", [GOOD])
        # Parquet has no struct without fields.
        connection.execute(
            "CREATE VIEW every AS SELECT * FROM pictures, (SELECT * EXCLUDE (empty_struct) FROM test_all_types())"
        )
        names = [row[0] for row in connection.execute("DESCRIBE every").fetchall()[2:]]
        connection.execute(f"COPY every TO '{file}' (FORMAT parquet)")
    stage = make(tmp_path, file, save_additional_columns=tuple(names))
    assert committed(stage).counts() == Counts(3, 3)
    # Their text, for a time of day loses its zone and an array its length, an interval is 12 bytes.
    same = [name for name in names if name not in ("time_tz", "interval", "geometry")]
    listed = ", ".join(f'CAST("{name}" AS VARCHAR)' for name in same)
    with duckdb.connect() as connection:
        wanted = connection.execute(f"SELECT {listed} FROM '{file}'").fetchall()
    assert described(tmp_path, f"SELECT {listed} FROM images ORDER BY key") == wanted
    other = make(tmp_path, file, dataset="other")
    assert len(run(other)) == 3
    assert run(other)[0].keys() == {*IMAGES.schema.names}
    out = io.StringIO()
    for format in ("json", "csv", "table"):
        print_query(Workspace(tmp_path / "ws"), "SELECT * FROM images", format, out)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (pa.array([7], pa.int32()), pa.array([2**40]), (pa.int64(), [7, 2**40])),
        (pa.array([7]), pa.array(["x"]), (pa.string(), ["7", "x"])),
        (pa.array([[1.5]]), pa.array([b"\xff"]), (pa.string(), ["[1.5]", "/w=="])),
        (pa.array([True]), pa.nulls(1), (pa.bool_(), [True, None])),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"]), (pa.string(), ["a", "b"])),
        (pa.array(["a"]), None, (pa.string(), ["a", None])),
    ],
    ids=["wider", "text", "json", "null", "dictionary", "absent"],
)
def test_files_that_differ_in_a_columns_type_are_of_one_in_the_part(tmp_path, first, second, wanted):
    """Would catch: a second file whose values do not fit the first one's type, which ended the run."""
    (tmp_path / "files").mkdir()
    for number, column in enumerate((first, second)):
        columns = {"jpg": [GOOD], "caption": ["a"], **({"x": column} if column is not None else {})}
        pq.write_table(pa.table(columns), tmp_path / "files" / f"{number}.parquet")
    stage = make(tmp_path, tmp_path / "files", save_additional_columns=("x",))
    rows = run(stage)
    assert [row["x"] for row in rows] == wanted[1]
    assert {table.schema.field("x").type for table in stage.output.tables()} == {wanted[0]}
    # A part whose files agree has the fingerprint it always had.
    assert ("types" in stage.identity()) == (second is not None)


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".jpg", "a\0b.jpg", "a/" * 3000 + "x.jpg", "loop/x.jpg", "file/x.jpg"]
)
@pytest.mark.parametrize("form", ["coco", "karpathy", "folder"])
def test_a_name_that_no_system_takes_is_a_missing_picture(tmp_path, name, form):
    """Catches a whole ingest that ends at one record's name."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "loop").symlink_to("loop")
    (tmp_path / "images" / "file").write_text("")
    folder, _, leaf = name.rpartition("/")
    contents = {
        "coco": {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]},
        "karpathy": {
            "images": [{"filename": leaf, "filepath": folder, "split": "train", "sentences": [{"raw": "a"}]}]
        },
    }
    path = tmp_path / "captions.json"
    if form == "folder":
        path = tmp_path / "images"
        (path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "a"}) + "\n")
        (path / "file").unlink()
    else:
        path.write_text(json.dumps(contents[form]))
    rows = run(make(tmp_path, path, format=form, images=str(tmp_path / "images")))
    assert {row["failure"] for row in rows if row["captions"]} == {"file_missing"}
