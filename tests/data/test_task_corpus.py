"""Catches: an answer given to another question, weights that are not the annotators' shares, left and right exchanged in
the text and not in the pictures, a picture with a side in its answer flipped, batches that depend on where a run was
resumed, an example left out without being counted.
"""

from __future__ import annotations

import io
from collections import Counter

import pyarrow as pa
import pytest
import torch
from PIL import Image

from capfilt.data.task_corpus import from_examples, task_batches
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.data.transforms import Views
from capfilt.tables.contracts import EXAMPLES, IMAGES

WORDS = [
    "what",
    "is",
    "it",
    "left",
    "right",
    "red",
    "green",
    "10",
    ":",
    "30",
    "dog",
    "the",
    "on",
    "cat",
    "yes",
    "no",
]
TOKENIZER = Tokenizer([*SPECIALS, *WORDS, *ADDED])


def picture(number: int, good: bool = True) -> dict:
    """A plain picture whose grey value is ten times its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * number,) * 3).save(buffer, "PNG")
    data = buffer.getvalue() if good else buffer.getvalue()[:40]
    return {
        "image_id": f"i{number}", "dataset": "d", "key": str(number), "source": "human", "captions": [],
        "status": "success", "image": {"bytes": data, "path": None},
    }  # fmt: skip


def images(count: int = 20) -> list[pa.Table]:
    return [IMAGES.table([picture(number, good=number != 19) for number in range(count)])]


def example(number: int, **changes) -> dict:
    row = {
        "example_id": f"e{number}", "dataset": "d", "key": str(number), "task": "vqa", "image_ids": [f"i{number}"],
        "text": "what is it", "answers": [{"answer": "red", "count": 1}], "split": "train",
    }  # fmt: skip
    return {**row, **changes}


def statement(number: int, text="the dog is on the left", **changes) -> dict:
    own = {"task": "nlvr", "image_ids": [f"i{number}", f"i{number + 1}"], "answers": [], "label": "true"}
    return example(number, **{**own, "text": text, **changes})


def corpus(rows, task="vqa", factor=1.0, **options):
    return from_examples([(EXAMPLES.table(rows), factor)], images(), task, size=8, **options)


def batches(found, size=4, **options):
    return task_batches(found, TOKENIZER, size, **{"steps": 6, "max_text_tokens": 12, **options})


def test_answers_are_with_their_question_and_weigh_the_annotators_share():
    given = {
        1: [("red", 6), ("10:30", 3), ("green", 1)],
        2: [("no", 10)],
        3: [("dog", 5), (" ", 3), ("cat", 2)],
    }
    rows = [example(n, answers=[{"answer": a, "count": c} for a, c in each]) for n, each in given.items()]
    both = from_examples(
        [(EXAMPLES.table(rows[:2]), 1.0), (EXAMPLES.table(rows[2:]), 0.2)], images(), "vqa", size=8
    )
    (batch,) = batches(both, 3, steps=1)
    assert batch.answer_ids.shape[:2] == batch.answer_weight.shape == (3, 3)
    found = {}
    for row, place in enumerate(batch.example.tolist()):
        number = int(both.example_ids[place][1:])
        assert int(batch.pixels[row, 0, 0, 0]) == 10 * number, "the question's own picture"
        rows = (batch.answer_ids[row], batch.answer_mask[row], batch.answer_weight[row].tolist())
        for ids, mask, weight in zip(*rows, strict=True):
            if weight:
                assert ids[0] == TOKENIZER.cls_id
                assert ids[int(mask.sum()) - 1] == TOKENIZER.sep_id
                found[number, TOKENIZER.decode(ids[1 : int(mask.sum())])] = round(weight, 4)
    assert found == {
        (1, "red"): 0.6, (1, "10 : 30"): 0.3, (1, "green"): 0.1, (2, "no"): 1.0,
        (3, "dog"): 0.1, (3, "cat"): 0.04,
    }  # fmt: skip
    parts = batch.split(2)
    assert [tuple(part.answer_ids.shape[:2]) for part in parts] == [(2, 3), (1, 3)]


def test_everything_left_out_is_counted():
    rows = [
        example(1), example(2, failure="no_image", image_ids=[]), example(3, split="val"), example(4, text="..."),
        example(5, answers=[]), statement(6), example(19), example(7, image_ids=["absent"]),
        example(8, image_ids=["i1", "i2"]), example(9, answers=[{"answer": "", "count": 2}]),
    ]  # fmt: skip
    found = corpus(rows)
    assert found.example_ids == ["e1"]
    # The broken picture is counted itself, and so is the example that has no other.
    assert found.skipped == {"empty_text": 1, "no_image": 3, "truncated": 1}
    assert found.deselected == {"no_answer": 2, "pictures": 1, "split": 1, "task": 1}
    assert sum(found.skipped.values()) - 1 + sum(found.deselected.values()) + len(found) == len(rows)
    wrong = [statement(1), statement(2, label=None), statement(3, image_ids=["i1", "i2", "i3"])]
    found = corpus(wrong, "nlvr")
    assert (found.example_ids, found.deselected) == (["e1"], {"no_label": 1, "pictures": 1})


def shown(batch) -> list[tuple[int, int, str]]:
    """(the left picture's number, the right one's, the text) of every example."""
    numbers = (batch.pixels[:, :, 0, 0, 0] // 10).tolist()
    return [(left, right, text) for (left, right), text in zip(numbers, batch.texts, strict=True)]


def test_a_pair_is_exchanged_with_its_words_or_not_at_all():
    texts = ["the dog is on the left", "the cat is on the right", "it is red"]
    found = corpus([statement(n, texts[n % 3]) for n in range(1, 13)], "nlvr")
    seen = Counter()
    for batch in batches(found, 6, steps=40, swap=0.5):
        for row, (left, right, text) in enumerate(shown(batch)):
            number = int(found.example_ids[int(batch.example[row])][1:])
            swapped = (left, right) == (number + 1, number)
            assert swapped or (left, right) == (number, number + 1)
            exchanged = {"left": "right", "right": "left"}
            words = texts[number % 3].split()
            expected = " ".join(exchanged.get(word, word) if swapped else word for word in words)
            assert text == expected
            ids = TOKENIZER.encode([expected], max_length=12)[0][0]
            assert torch.equal(batch.ids[row, : len(ids)], ids)
            assert batch.image_index[row].tolist() == [found.image_ids.index(f"i{n}") for n in (left, right)]
            assert bool(batch.sided[row]) == (number % 3 != 2)
            assert int(batch.label[row]) == 1
            seen[swapped] += 1
    assert 90 < seen[True] < 150, seen
    assert all(left < right for batch in batches(found, 6, steps=4) for left, right, _ in shown(batch)), (
        "off by default"
    )


def test_one_picture_is_shown_twice_and_its_words_are_left_alone():
    found = corpus([statement(n, image_ids=[f"i{n}"], label="false") for n in range(1, 9)], "nlvr")
    for batch in batches(found, 4, steps=8, swap=1.0):
        assert all(left == right and text == "the dog is on the left" for left, right, text in shown(batch))
        assert batch.label.tolist() == [0] * 4


def test_a_side_in_the_answer_keeps_the_picture_from_being_flipped():
    rows = [
        example(1), example(2, text="what is on the left"), example(3, answers=[{"answer": "Left", "count": 1}]),
        example(4, answers=[{"answer": "cleft", "count": 1}]),
    ]  # fmt: skip
    found = corpus(rows)
    (batch,) = batches(found, 4, steps=1)
    sided = {
        int(found.example_ids[n][1:]): bool(s)
        for n, s in zip(batch.example.tolist(), batch.sided, strict=True)
    }
    assert sided == {1: False, 2: True, 3: True, 4: False}


def same(left, right) -> bool:
    pairs = zip(vars(left).values(), vars(right).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("task", ["vqa", "nlvr"])
def test_batches_are_the_same_again_and_from_any_step(task):
    rows = [(example if task == "vqa" else statement)(n) for n in range(1, 12)]
    found = corpus(rows, task)

    views = Views((0.3, 1.0), flip=0.5, seed=3)
    options = {"swap": 0.5, "views": views, "seed": 3}
    whole = list(batches(found, **options))
    assert all(same(a, b) for a, b in zip(whole, batches(found, **options), strict=True))
    assert all(same(a, b) for a, b in zip(whole[4:], batches(found, start_step=4, **options), strict=True))
    assert not same(whole[0], next(iter(batches(found, **{**options, "seed": 4}))))
    assert Counter(n for batch in whole for n in batch.example.tolist()).total() == 24
    assert whole[0].pixels.shape == ((4, 3, 8, 8) if task == "vqa" else (4, 2, 3, 8, 8))


def test_a_listed_answer_stands_for_every_spelling_of_it():
    given = {1: "T shirt", 2: "none", 3: "red"}
    rows = [example(n, answers=[{"answer": a, "count": 1}]) for n, a in given.items()]
    found = corpus(rows, classes=lambda questions: ("t-shirt", "0"))
    assert found.classes == ("t-shirt", "0")
    assert dict(zip(found.example_ids, found.targets, strict=True)) == {"e1": ((0, 1.0),), "e2": ((1, 1.0),)}
    assert found.deselected == {"unlisted": 1}
