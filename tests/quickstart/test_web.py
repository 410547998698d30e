"""Catches a web whose planted wrongs are true, can be told by their words alone, or move when the web grows."""

from __future__ import annotations

import collections
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.quickstart.language import parse
from capfilt.quickstart.textonly import text_only_auc
from capfilt.quickstart.truth import KINDS, is_complete_and_true, is_true
from capfilt.quickstart.web import (
    KIND_SHARES,
    TINY_PIXELS,
    TROUBLE_SHARES,
    build_human,
    build_web,
    picture_bytes,
    troubled_bytes,
    write_human,
    write_web,
)
from capfilt.quickstart.world import Scene

BASE = "http://127.0.0.1:20000"


@pytest.fixture(scope="module")
def pages():
    return build_web(3, 4000)


def test_every_text_is_what_its_kind_says(pages):
    for page in pages:
        assert KINDS[page.kind].well_formed == (parse(page.text) is not None), page
        assert is_true(page.text, page.scene) == KINDS[page.kind].true, page
        if page.kind == "true":
            assert is_complete_and_true(page.text, page.scene)
        assert (page.changed is not None) == (page.kind == "one_attribute_off")


def test_shares_are_as_asked(pages):
    kinds = collections.Counter(page.kind for page in pages)
    for kind, share in KIND_SHARES.items():
        assert kinds[kind] / len(pages) == pytest.approx(share, abs=0.015), kind
    wrong = kinds["other_image"] + kinds["one_attribute_off"]
    assert kinds["one_attribute_off"] / wrong == pytest.approx(1 / 3, abs=0.04)
    assert kinds["true"] > len(pages) / 2
    troubles = collections.Counter(page.trouble for page in pages)
    for trouble, share in TROUBLE_SHARES.items():
        assert troubles[trouble] / len(pages) == pytest.approx(share, abs=0.006), trouble
    assert np.mean([page.picture != page.number for page in pages]) == pytest.approx(0.03, abs=0.01)
    changed = collections.Counter(page.changed for page in pages)
    assert all(changed[fact] > 5 for fact in ("colour", "shape", "size", "relation", "background"))


def test_words_alone_do_not_tell_true_from_wrong(pages):
    captions = [page for page in pages if KINDS[page.kind].well_formed]
    for some in (captions, [page for page in captions if page.kind != "other_image"]):
        assert text_only_auc([page.text for page in some], [page.kind == "true" for page in some]) < 0.55


def test_a_page_does_not_depend_on_the_number_of_pages(pages):
    assert build_web(3, 300) == pages[:300]
    assert build_web(4, 300) != pages[:300]
    assert len({page.path for page in pages}) == len(pages)


def test_duplicates_show_the_same_bytes_under_their_own_address(pages):
    copies = [page for page in pages[:800] if page.picture != page.number]
    assert len(copies) > 5
    for page in copies:
        first = pages[page.picture]
        assert first.picture == first.number < page.number
        assert page.scene == first.scene
        assert page.path != first.path
        assert picture_bytes(page) == picture_bytes(first)


def test_bytes_are_those_of_a_picture_or_of_its_trouble(pages):
    seen = set()
    for page in pages:
        if page.trouble in seen and page.number > 200:
            continue
        seen.add(page.trouble)
        data, content_type = troubled_bytes(page)
        assert troubled_bytes(page) == (data, content_type)
        if page.trouble in ("cut_short", "corrupt", "wrong_type"):
            assert content_type == "image/jpeg"
            with pytest.raises(OSError, match=r"(?i)identify|truncated|broken"):
                Image.open(io.BytesIO(data)).load()
        else:
            picture = Image.open(io.BytesIO(data))
            picture.load()
            assert content_type == f"image/{page.format}" == f"image/{picture.format.lower()}"
            assert (max(picture.size) <= TINY_PIXELS) == (page.trouble == "tiny")
            assert picture.size[0] >= 80 or page.trouble == "tiny"
    assert seen == {"none", *TROUBLE_SHARES}
    assert {page.format for page in pages} == {"jpeg", "png", "webp"}


def test_troubled_bytes_get_the_status_said_from_the_downloader_s_decoder(pages):
    cv2 = pytest.importorskip("cv2", reason="img2dataset is an extra")
    for trouble in ("cut_short", "corrupt", "wrong_type", "tiny", "none"):
        for page in [page for page in pages if page.trouble == trouble][:25]:
            picture = cv2.imdecode(np.frombuffer(troubled_bytes(page)[0], np.uint8), cv2.IMREAD_UNCHANGED)
            fails = picture is None or min(picture.shape[:2]) <= TINY_PIXELS
            assert fails == (trouble != "none")


def test_the_url_list_tells_nothing_and_the_truth_tells_all(tmp_path, pages):
    write_web(tmp_path, pages, BASE)
    urls = pq.read_table(tmp_path / "urls.parquet")
    truth = pq.read_table(tmp_path / "truth.parquet")
    assert urls.column_names == ["url", "caption", "scene_id"]
    assert urls["url"].equals(truth["url"])
    assert urls["scene_id"].equals(truth["scene_id"])
    assert len(set(urls["url"].to_pylist())) == len(pages)
    assert urls["url"][0].as_py().startswith(BASE + "/")
    for page, row in zip(pages, truth.to_pylist(), strict=True):
        assert Scene.from_json(row["scene"]) == page.scene
        assert (row["kind"], row["changed"], row["trouble"]) == (page.kind, page.changed, page.trouble)
        assert (row["well_formed"], row["true"]) == (
            (parse(page.text) is not None),
            is_true(page.text, page.scene),
        )


def test_the_human_set_is_true_complete_and_stable(tmp_path):
    rows = build_human(5, {"train": 60, "test": 20})
    assert collections.Counter(row.split for row in rows) == {"train": 60, "test": 20}
    for row in rows:
        assert len(set(row.captions)) == 5
        assert all(is_complete_and_true(text, row.scene) for text in row.captions)
    smaller = {row.id: row for row in build_human(5, {"train": 7, "test": 20})}
    assert [row for row in rows if row.id in smaller] == list(smaller.values())
    path = write_human(tmp_path, rows)
    data = json.loads(path.read_text())
    assert [image["id"] for image in data["images"]] == [row.id for row in rows]
    by_image = collections.defaultdict(list)
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(annotation["caption"])
    assert {row.id: list(row.captions) for row in rows} == by_image
    assert len({annotation["id"] for annotation in data["annotations"]}) == 5 * len(rows)
    for image in data["images"]:
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            picture.load()
            assert picture.size == (image["width"], image["height"])
    before = {file.name: file.read_bytes() for file in (tmp_path / "images").iterdir()}
    write_human(tmp_path, rows)
    assert {file.name: file.read_bytes() for file in (tmp_path / "images").iterdir()} == before
    assert not list(tmp_path.glob("*.tmp"))


def test_human_and_web_pictures_are_other_scenes():
    human = {row.scene for row in build_human(3, {"train": 200})}
    assert not human & {page.scene for page in build_web(3, 200)}


def test_human_captions_of_a_test_set_find_their_image_more_often_than_not():
    """The ceiling of text-to-image retrieval: captions true of several test images cannot be told apart by anybody."""
    rows = build_human(0, {"test": 100})
    fits = [sum(is_true(text, other.scene) for other in rows) for row in rows for text in row.captions]
    assert np.mean(1 / np.array(fits)) > 0.6
