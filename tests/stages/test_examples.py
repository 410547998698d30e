"""Catches: an example lost or counted twice, a question given another picture, left and right exchanged, answers whose
counts do not add up, a label read the wrong way round, a withheld answer taken for a fault, or a fault for an answer.
"""

from __future__ import annotations

import json
import pickle
import unicodedata
from collections import Counter

import pyarrow as pa
import pytest

from capfilt.stages.examples import ExamplesOptions
from capfilt.stages.examples.stage import Examples
from capfilt.tables.contracts import EXAMPLES
from capfilt.tables.ids import example_id, image_id
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import failed_row, image_rows, write_images

COCO = ["COCO_train2014_000000000009.jpg", "train2017/000000000025.jpg", "30.jpg"]


def keyed(keys: list[str]) -> list[dict]:
    rows = image_rows("pictures", len(keys))
    return [
        {**row, "key": key, "image_id": image_id("pictures", key)}
        for row, key in zip(rows, keys, strict=True)
    ]


@pytest.fixture
def place(tmp_path):
    return Workspace(tmp_path / "ws")


def make(place, source, keys, annotations=None, **options):
    """The stage over an images part with these keys."""
    path = place.path / "source.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source if isinstance(source, str) else json.dumps(source))
    if annotations is not None:
        options["annotations"] = str(place.path / "answers.json")
        (place.path / "answers.json").write_text(json.dumps({"annotations": annotations}))
    part = place.part("images", "pictures")
    if not part.exists:
        write_images(part, [[*keyed(keys), failed_row("pictures", "lost.jpg")]])
    options = {"images": ("pictures",), "dataset": "set", "source_path": str(path), **options}
    return Examples(ExamplesOptions(**options), place)


def run(stage) -> list[dict]:
    """What an executor does, in this process; returns the rows, in order."""
    stage = pickle.loads(pickle.dumps(stage))
    mark = stage.begin()
    stage.setup()
    for shard in stage.shards():
        out = stage.process(shard)
        assert out.counts.rows_in == stage.expected_rows(shard) == out.table.num_rows
        stage.output.commit(shard, out.table, out.counts, stage.shard_fingerprint(mark, shard), 1.0)
    return pa.concat_tables(stage.output.tables()).to_pylist()


def question(number, image, text="what is it"):
    return {"question_id": number, "image_id": image, "question": text}


def answers(number, *given):
    listed = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(given)
    ]
    return {"question_id": number, "image_id": 9, "answers": listed, "multiple_choice_answer": given[0]}


def test_vqa_v2_questions_meet_their_answers_and_pictures(place):
    source = {
        "data_subtype": "train2014",
        "questions": [question(1, 9), question(2, 25), question(3, 30), question(4, 31), question(5, 9), question(6, 9, " ")],
    }  # fmt: skip
    given = [
        answers(2, "red"),
        answers(1, *["yes"] * 6, "Yes", *["no"] * 3),
        *(answers(n, "x") for n in (3, 4, 6)),
    ]
    stage = make(place, source, COCO, given, shard_size=4)
    rows = {row["key"]: row for row in run(stage)}
    assert list(rows) == ["1", "2", "3", "4", "5", "6"]
    assert [row["image_ids"] for row in rows.values()][:4] == [
        [image_id("pictures", key)] for key in COCO
    ] + [[]]
    assert rows["1"]["answers"] == [
        {"answer": "yes", "count": 6},
        {"answer": "Yes", "count": 1},
        {"answer": "no", "count": 3},
    ]
    assert [rows[key]["failure"] for key in rows] == [None, None, None, "no_image", "no_answer", "empty_text"]
    assert {row["split"] for row in rows.values()} == {"train"}
    assert rows["1"]["example_id"] == example_id("set", "1")
    assert {(row["task"], row["label"]) for row in rows.values()} == {("vqa", None)}
    counts = stage.output.counts()
    assert (counts.rows_in, counts.kept) == (6, 3)
    assert counts.failed == {"no_image": 1, "no_answer": 1, "empty_text": 1}
    assert stage.output.contract == EXAMPLES


def test_a_test_split_without_answers_is_no_fault(place):
    (row,) = run(make(place, {"data_subtype": "test2015", "questions": [question(1, 30)]}, COCO))
    assert (row["answers"], row["failure"], row["split"]) == ([], None, "test")


def test_annotations_of_other_questions_are_found_out(place):
    stage = make(place, {"questions": [question(1, 9)]}, COCO, [answers(7, "x")])
    with refused("--annotations", "questions"):
        stage.begin()


def test_nlvr2_lines_find_both_pictures_in_order(place):
    keys = [
        "train/55/train-1-0-img1.png",
        "train/55/train-1-0-img0.png",
        "dev-2-0-img0.png",
        "dev-2-0-img1.png",
    ]
    lines = [
        {
            "identifier": "train-1-0-0",
            "sentence": "left is red",
            "label": "True",
            "left_url": "u",
            "directory": 55,
        },
        {"identifier": "dev-2-0-1", "sentence": "both", "label": "False"},
        {"identifier": "dev-3-0-0", "sentence": "gone", "label": "False"},
        {
            "identifier": "test1-2-0-0",
            "sentence": "withheld",
            "images": ["dev-2-0-img0.png", "dev-2-0-img1.png"],
        },
        {"identifier": "dev-2-0-2", "sentence": "odd", "label": "maybe"},
    ]
    rows = run(make(place, "\n".join(map(json.dumps, lines)), keys))
    ids = [image_id("pictures", key) for key in keys]
    assert [row["image_ids"] for row in rows] == [[ids[1], ids[0]], ids[2:], [], ids[2:], ids[2:]]
    assert [row["label"] for row in rows] == ["true", "false", "false", None, None]
    assert [row["failure"] for row in rows] == [None, None, "no_image", None, "unknown_label"]
    assert [row["split"] for row in rows] == ["train", "val", "val", None, "val"]
    assert {row["task"] for row in rows} == {"nlvr"}


def test_records_of_other_tools(place):
    """BLIP's own annotation lists and entailment records; one picture that came to nothing, one name two pictures share."""
    keys = ["a/1.jpg", "b/1.jpg", "set/images/2.jpg"]
    records = [
        {
            "hypothesis": "a dog",
            "image": "images/2.jpg",
            "label": "Entailment",
            "split": "dev",
            "pair_id": "p",
        },
        {"hypothesis": "a cat", "image": "1.jpg", "label": "neutral", "pair_id": "q"},
        {"hypothesis": "a cat", "image": "b/1.jpg", "label": "neutral", "pair_id": "q"},
        {"hypothesis": "a cow", "image": "lost.jpg", "label": "contradiction"},
        "no record",
    ]
    rows = run(make(place, records, keys))
    assert [row["key"] for row in rows] == ["p", "q", "q#2", "#3", "#4"]
    assert [row["failure"] for row in rows] == [None, "no_image", None, "no_image", "no_image"]
    assert "not_found" in rows[3]["error_message"]
    assert rows[0]["label"] == "entailment"
    assert rows[0]["split"] == "val"
    assert {row["task"] for row in rows} == {"entailment"}


def test_splits_limit_and_shards_change_which_rows_and_not_what_they_are(place):
    asked = {"question": "q", "image": COCO[2], "answers": ["a"]}
    records = [{"question_id": n, "split": "train" if n % 2 else "val", **asked} for n in range(9)]
    whole = run(make(place, records, COCO))
    some = run(make(place, records, COCO, dataset="some", splits=("train",), limit=3, shard_size=2))
    assert [row["key"] for row in some] == ["1", "3", "5"]
    ignored = {"example_id", "dataset"}
    plain = {row["key"]: {k: v for k, v in row.items() if k not in ignored} for row in whole}
    assert [{k: v for k, v in row.items() if k not in ignored} for row in some] == [
        plain[row["key"]] for row in some
    ]


def test_another_file_or_other_pictures_are_another_identity(place):
    records = [{"question_id": 1, "question": "q", "image": COCO[2], "answers": ["a"]}]
    stage = make(place, records, COCO)
    stage.begin()
    records[0]["answers"] = ["b"]
    with refused("identity"):
        make(place, records, COCO).begin()
    assert make(place, records, COCO).identity()["images"] == stage.identity()["images"]


@pytest.mark.parametrize(
    ("image", "keys", "key"),
    [
        # A path's tail, on either side.
        ("images/7.jpg", ["7.jpg"], "7.jpg"),
        ("./a/7.jpg", ["b/7.jpg", "x/a/7.jpg"], "x/a/7.jpg"),
        ("7.jpg", ["a/b/7.jpg"], "a/b/7.jpg"),
        ("7", ["a/7.jpg"], "a/7.jpg"),
        ("a/7.png", ["a/7.jpg", "b/7.jpg"], "a/7.jpg"),
        # Another folder is another picture, even where no other is called so.
        ("a/7.jpg", ["b/7.jpg"], None),
        ("a/7.jpg", ["b/a7.jpg"], None),
        ("7.jpg", ["a/7.jpg", "b/7.jpg"], None),
        # Names that tell pictures apart wherever they lie.
        ("val/COCO_val2014_000000000007.jpg", ["v/COCO_val2014_000000000007.jpg"], "v/COCO_val2014_000000000007.jpg"),
        ("train2017/000000000007.jpg", ["coco/000000000007.jpg"], "coco/000000000007.jpg"),
        ("images/train/train-1-0-img0.png", ["train/55/train-1-0-img0.png"], "train/55/train-1-0-img0.png"),
        ("image/7.jpg", ["VG_100K_2/7.jpg"], "VG_100K_2/7.jpg"),
        # Numbers: COCO's names, and a name that is the number; never one that ends with it.
        (7, ["COCO_val2014_000000000007.jpg"], "COCO_val2014_000000000007.jpg"),
        (7, ["COCO_val2014_000000000007.jpg", "COCO_train2014_000000000007.jpg"], "COCO_train2014_000000000007.jpg"),
        (7, ["x/000000000007.jpg"], "x/000000000007.jpg"),
        (7, ["images/7.png", "17.png"], "images/7.png"),
        (7, ["flickr_7.jpg"], None),
        (7, ["scene-7.jpg", "0007.jpg"], None),
        (7, ["a/7.jpg", "b/7.jpg"], None),
    ],
)  # fmt: skip
def test_a_name_finds_its_own_picture_or_none(place, image, keys, key):
    source = {"data_subtype": "train2014", "questions": [question(1, image)]}
    (row,) = run(make(place, source, keys))
    assert row["image_ids"] == ([] if key is None else [image_id("pictures", key)])
    assert row["failure"] == ("no_image" if key is None else None)


def test_a_flat_picture_is_not_two_folders_pictures(place):
    asked = {"sentence": "a dog", "label": True}
    named = ["cat/1.jpg", "dog/1.jpg", "cat/2.jpg", "images/cat/2.jpg"]
    rows = run(make(place, [{**asked, "image": name} for name in named], ["1.jpg", "2.jpg"]))
    assert [row["failure"] for row in rows] == ["no_image", "no_image", None, None]
    assert rows[2]["image_ids"] == rows[3]["image_ids"] == [image_id("pictures", "2.jpg")]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("[]", {}, "examples"),
        ('{"images":\n[]}', {}, "`questions`"),
        ('[{"question": "a"}]', {"task": "vcr"}, "--task vcr"),
        ('[{"question": "a"}]', {"splits": ("test",)}, "splits test"),
        ('[{"question": "a"}]', {"images": ()}, "--images"),
        ('[{"question": "a"}]', {"annotations": "x.json"}, "--annotations answers"),
    ],
)
def test_wrong_sources_and_options_are_named(place, source, options, message):
    with refused(message):
        make(place, source, COCO, **options).begin()


@pytest.mark.parametrize(("name", "task", "count"), [("vqa_daquar", "vqa", 10_791), ("nlvr1", "nlvr", 2_506)])
def test_real_data(place, shared_data, name, task, count):
    folder = shared_data / "tasks" / name
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    keys = sorted({record["image"].removeprefix("images/") for record in records})
    rows = run(make(place, (folder / "data.jsonl").read_text(), keys, shard_size=4000))
    assert len(rows) == len({row["example_id"] for row in rows}) == count
    assert Counter(row["split"] for row in rows) == Counter(record["split"] for record in records)
    assert {row["failure"] for row in rows} == {None}
    for row, record in zip(rows, records, strict=True):
        assert row["image_ids"] == [image_id("pictures", record["image"].removeprefix("images/"))]
        assert row["task"] == task
        if task == "nlvr":
            assert row["label"] == str(record["label"]).lower()
        else:
            assert sum(each["count"] for each in row["answers"]) == len(record["answers"])


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_ratings_keep_every_annotator(place):
    source = lines(
        {
            "image": "clean/images/30.jpg",
            "caption_id": "x#2",
            "caption": "a dog",
            "ratings": [1, 1, 2],
            "split": "test",
        },
        {"image": "30.jpg", "caption": "a cat", "ratings": [], "split": "test"},
        {"image": "30.jpg", "caption": "a cat", "ratings": ["good"], "split": "test"},
    )
    stage = make(place, source, COCO)
    # A part from before own captions were marked is made again.
    assert stage.identity()["own_captions"] == "marked"
    rows = run(stage)
    assert {row["task"] for row in rows} == {"rating"}
    assert rows[0]["answers"] == [{"answer": "1", "count": 2}, {"answer": "2", "count": 1}]
    assert (rows[0]["text"], rows[0]["key"]) == ("a dog", "#0")
    assert [row["failure"] for row in rows] == [None, "no_answer", "no_answer"]


def test_choices_keep_their_wrong_texts_and_categories(place):
    record = {
        "image": "30.jpg",
        "caption": "a red dog",
        "negative_caption": "a blue dog",
        "category": "swap_att",
        "item_id": "swap_att:2",
    }
    rows = run(make(place, lines(record, {**record, "item_id": "x", "negative_caption": " "}), COCO))
    assert {row["task"] for row in rows} == {"choice"}
    assert (rows[0]["text"], rows[0]["wrong_texts"], rows[0]["category"]) == (
        "a red dog",
        ["a blue dog"],
        "swap_att",
    )
    assert rows[0]["key"] == "swap_att:2"
    assert [row["failure"] for row in rows] == [None, "no_answer"]


def test_matches_are_labelled_in_more_than_one_spelling(place):
    given = ["match", "no-match", "no_match", True, 0, "maybe", None]
    records = [{"image": "30.jpg", "caption": "a dog", "label": label} for label in given]
    rows = run(make(place, lines(*records), COCO))
    assert {row["task"] for row in rows} == {"match"}
    assert [row["label"] for row in rows] == [
        "match",
        "no-match",
        "no-match",
        "match",
        "no-match",
        None,
        None,
    ]
    assert [row["failure"] for row in rows][-2:] == ["unknown_label", "no_answer"]


def test_a_label_without_a_text_is_a_class(place):
    rows = run(make(place, lines({"image": "30.jpg", "label": "Polar Bear", "split": "train"}), COCO))
    (row,) = rows
    assert (row["task"], row["label"], row["text"], row["failure"]) == (
        "classification",
        "Polar Bear",
        None,
        None,
    )


def test_folders_of_classes_are_classes(place, tmp_path):
    keys = ["train/dog/1.jpg", "train/polar_bear/2.jpg", "val/dog/1.jpg", "cat/3.jpg"]
    root = tmp_path / "classes"
    for key in (*keys, "cat/notes.txt", "stray.jpg"):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).touch()
    write_images(place.part("images", "pictures"), [keyed(keys)])
    options = ExamplesOptions(source_path=str(root), images=("pictures",), dataset="set")
    rows = {row["key"]: row for row in run(Examples(options, place))}
    assert {key: (row["label"], row["split"]) for key, row in rows.items()} == {
        "cat/3.jpg": ("cat", None),
        "train/dog/1.jpg": ("dog", "train"),
        "train/polar_bear/2.jpg": ("polar_bear", "train"),
        "val/dog/1.jpg": ("dog", "val"),
    }
    assert rows["val/dog/1.jpg"]["image_ids"] == [image_id("pictures", "val/dog/1.jpg")]
    before = Examples(options, place).identity()
    (root / "cat" / "4.jpg").touch()
    assert Examples(options, place).identity() != before
    with refused(tmp_path / "ws", "class"):
        Examples(
            ExamplesOptions(source_path=str(tmp_path / "ws"), images=("pictures",), dataset="x"), place
        ).identity()


@pytest.mark.parametrize(("stored", "asked"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_a_picture_is_found_however_its_accents_are_spelled(place, stored, asked):
    key = unicodedata.normalize(stored, "für/Küche.jpg")
    record = {"question": "what?", "image": unicodedata.normalize(asked, "Küche.png")}
    (row,) = run(make(place, [record], [key]))
    assert row["image_ids"] == [image_id("pictures", key)]


def test_a_record_that_cannot_be_read_is_a_row_that_says_so(place):
    rows = run(make(place, '{"question": "a", "image": "1.jpg"}\n{"question"\n', ["1.jpg"]))
    assert [row["failure"] for row in rows] == [None, "no_image"]
    assert "is not JSON" in rows[1]["error_message"]


@pytest.mark.parametrize("image", ["\ud800", "a\udfff.jpg", ["\ud800", "30.jpg"], "\ud83d/31.jpg"])
def test_a_picture_whose_name_utf_8_cannot_hold_is_a_row_without_it(place, image):
    """Its name in the row's message ended the stage with a traceback."""
    records = [
        {"question": "q", "answer": "a", "image": image},
        {"question": "q", "answer": "a", "image": COCO[2]},
    ]
    rows = run(make(place, records, COCO))
    assert [row["failure"] for row in rows] == ["no_image", None]
