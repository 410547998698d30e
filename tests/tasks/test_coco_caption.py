"""Would catch: figures that are not pycocoevalcap's own, a Java part that is missing taken for a score of zero or left out
without a word, a failure of METEOR that hangs for ever, a Java that cannot start ending in a traceback, and anything fetched
from the network."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading

import pytest

from capfilt.tasks import coco_caption
from capfilt.tasks.captioning import caption_metrics
from capfilt.tasks.coco_caption import SPICE_MODELS, coco_figures
from tests.refusals import refused

pytest.importorskip("pycocoevalcap")
JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")

CAPTIONS = [
    "A dog runs on the grass.",
    "two men can't ride a red-brown horse",
    "",
    "a cat sits on a mat, again",
]
REFERENCES = [
    ["A brown dog is running on green grass .", "the dog runs", "A dog!"],
    ["Two men ride a horse", "Men on a horse."],
    ["a boat on the water"],
    ["A cat on a mat.", "The cat sat on the mat", "some cat", "a cat sits"],
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("something asks for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@JAVA
def test_all_that_java_can_do_agrees_with_what_needs_none():
    found = coco_figures(CAPTIONS, REFERENCES)
    ours = caption_metrics(CAPTIONS, REFERENCES)
    for name in ("bleu@1", "bleu@2", "bleu@3", "bleu@4", "rouge_l", "cider"):
        assert found.metrics[name] == pytest.approx(ours.metrics[name], abs=1e-6), name
    assert found.per_image["cider"] == pytest.approx(ours.cider, abs=1e-6)
    assert found.per_image["rouge_l"] == pytest.approx(ours.rouge_l, abs=1e-6)
    assert 5 < found.metrics["meteor"] < 60
    assert found.tokenizer == "Stanford's PTBTokenizer"
    assert ("spice" in found.metrics) != ("spice" in found.skipped)


def test_without_java_its_parts_are_skipped_by_name(monkeypatch):
    monkeypatch.setattr(coco_caption.shutil, "which", lambda name: None)
    found = coco_figures(CAPTIONS, REFERENCES)
    assert found.skipped == dict.fromkeys(("meteor", "spice"), "there is no `java` on the PATH")
    assert found.metrics == pytest.approx(caption_metrics(CAPTIONS, REFERENCES).metrics, abs=1e-6)
    assert "no Java" in found.tokenizer


def test_spice_says_which_files_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(coco_caption, "_package", lambda: tmp_path)
    (reason,) = coco_caption._unable("java").values()
    assert all(name in reason for name in SPICE_MODELS)
    assert "downloads nothing" in reason
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in SPICE_MODELS:
        (tmp_path / "spice" / "lib" / name).touch()
    assert coco_caption._unable("java") == {}


def test_a_scorer_that_breaks_is_skipped_with_its_reason(monkeypatch):
    real = coco_caption._scored

    def broken(name, gts, res):
        if name == "meteor":
            raise ValueError("could not convert string to float: ''\nmore")
        return real(name, gts, res)

    monkeypatch.setattr(coco_caption, "_scored", broken)
    monkeypatch.setattr(coco_caption, "_unable", lambda java: {})
    monkeypatch.setattr(coco_caption.shutil, "which", lambda name: None)
    found = coco_figures(CAPTIONS, REFERENCES)
    assert found.skipped["meteor"] == "ValueError: could not convert string to float: ''"
    assert "cider" in found.metrics


def fake_java(monkeypatch, tmp_path, script):
    """A `java` before any other that does this."""
    path = tmp_path / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize("sentences", [(CAPTIONS, REFERENCES), (["a dog"], [["a cat"]])])
def test_a_java_that_cannot_start_is_named_and_the_rest_is_scored(monkeypatch, tmp_path, sentences):
    fake_java(monkeypatch, tmp_path, "exit 1")
    found = coco_figures(*sentences)
    assert set(found.skipped) == {"meteor", "spice"}
    assert all("Java's tokenizer failed" in reason for reason in found.skipped.values())
    assert "failed" in found.tokenizer
    assert found.metrics == pytest.approx(caption_metrics(*sentences).metrics, abs=1e-6)


def test_a_failure_of_meteor_ends(monkeypatch, tmp_path):
    from pycocoevalcap.meteor.meteor import Meteor

    def broken(self, hypothesis, references):
        raise ValueError("no statistics")

    fake_java(monkeypatch, tmp_path, "exec cat")
    monkeypatch.setattr(Meteor, "_stat", broken)
    said = []

    def score():
        try:
            coco_caption._scored("meteor", {0: ["a dog"]}, {0: ["a dog"]})
        except ValueError as error:
            said.append(str(error))

    # In a thread of its own: what waits for its own lock would wait here for ever.
    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert said == ["no statistics"]


def test_java_speaks_english_and_only_while_it_scores(monkeypatch, tmp_path):
    """With a comma in its numbers METEOR's figures are no figures."""
    fake_java(monkeypatch, tmp_path, f'echo "$JAVA_TOOL_OPTIONS" >> {tmp_path}/said; exit 1')
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xss4m")
    coco_figures(CAPTIONS, REFERENCES)
    with pytest.raises((ValueError, OSError)):
        coco_caption._scored("meteor", {0: ["a dog"]}, {0: ["a dog"]})
    told = (tmp_path / "said").read_text().splitlines()
    assert set(told) == {"-Xss4m -Duser.language=en -Duser.country=US"}
    assert len(told) >= 2
    assert os.environ["JAVA_TOOL_OPTIONS"] == "-Xss4m"
    monkeypatch.delenv("JAVA_TOOL_OPTIONS")
    coco_figures(CAPTIONS, REFERENCES)
    assert "JAVA_TOOL_OPTIONS" not in os.environ


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(coco_caption.importlib.util, "find_spec", lambda name: None)
    with refused("--caption-scorer", "capfilt[eval]"):
        coco_figures(CAPTIONS, REFERENCES)
