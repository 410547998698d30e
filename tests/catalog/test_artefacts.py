"""Would catch: a torn log or foreign result that stops a report, figures lost, a checkpoint not recognised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from capfilt.catalog import artefacts
from capfilt.catalog.artefacts import (
    leaves,
    number,
    origins,
    read_json,
    read_log,
    read_models,
    read_runs,
    shown_figures,
)
from capfilt.tables.ids import file_sha256


def test_log_keeps_finite_numbers_in_order_of_the_steps(tmp_path: Path) -> None:
    lines = [
        '{"step": 20, "lm": 1.5, "seconds": 9, "note": "x", "flag": true}',
        '{"step": 10, "lm": 2, "itm": NaN}',
        "[1, 2]",
        '{"lm": 7}',
        '{"step": "30", "lm": 7}',
        '{"step": 30, "lm',
    ]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\xfe")
    assert read_log(tmp_path / "log.jsonl") == {"lm": ((10.0, 2.0), (20.0, 1.5))}
    assert read_log(tmp_path / "absent.jsonl") == {}


def test_models_still_in_training_count_and_strays_do_not(tmp_path: Path) -> None:
    for name in ("done", "training", "stray"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "done" / "config.json").write_text('{"extra": {"stage": "pretrain"}}')
    (tmp_path / "training" / "log.jsonl").write_text('{"step": 1, "loss": 2}\n')
    done, training = read_models(tmp_path)
    assert (done.name, done.extra, dict(done.series), done.fingerprint) == (
        "done",
        {"stage": "pretrain"},
        {},
        "",
    )
    assert (training.name, dict(training.series)) == ("training", {"loss": ((1.0, 2.0),)})
    assert list(read_models(tmp_path / "absent")) == []


def test_checkpoint_fingerprint_is_the_models_rooms_own(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("capfilt.models.checkpoint")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    files = {name: file_sha256(tmp_path / name) for name in ("model.safetensors", "tokenizer.json")}
    (tmp_path / "config.json").write_text(json.dumps({"files": files}))
    assert artefacts.checkpoint_fingerprint(tmp_path) == checkpoint.fingerprint(tmp_path)


def test_a_log_that_changed_is_told_and_not_drawn(tmp_path: Path) -> None:
    """Catches curves of a damaged log beside figures of the run that wrote another."""
    (tmp_path / "a").mkdir()
    log = tmp_path / "a" / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n')
    files = {"log.jsonl": hashlib.sha256(log.read_bytes()).hexdigest()}
    (tmp_path / "a" / "config.json").write_text(json.dumps({"files": files, "extra": {"warnings": ["x"]}}))
    (found,) = artefacts.read_models(tmp_path)
    assert found.series == {"loss": ((1.0, 2.5),)}
    log.write_text('{"step": 1, "loss": 7.5}\n')
    (found,) = artefacts.read_models(tmp_path)
    assert not found.series
    assert [each.partition(" changed")[0] for each in found.extra["warnings"]] == ["x", "log.jsonl"]


def test_origins_of_any_shape() -> None:
    digest = "0123456789abcdef" * 4
    said = {
        digest: {"given": "./blip", "layout": "transformers"},
        f"clip:{digest}": {"given": "clip:/data/b32", "layout": "plug-in"},
        "vlm:v2": {"given": "vlm:", "layout": "plug-in"},
        "long": {"given": "/" + "x" * 200 + "/end", "layout": "original"},
        "half": {"given": "./blip"},
        "numbers": {"given": 1, "layout": 2},
        "text": "torn",
    }
    found = dict(origins({"origins": said}))
    assert found.pop("long").endswith("xxx/end (original, long)")
    assert found == {
        digest: "./blip (transformers, 0123456789ab)",
        f"clip:{digest}": "clip:/data/b32 (plug-in, 0123456789ab)",
        "vlm:v2": "vlm: (plug-in, v2)",
    }
    assert dict(origins({})) == dict(origins({"origins": ["torn"]})) == {}


def test_runs_of_any_shape(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(
        '{"name": "B", "metrics": {"tr@1": 5, "note": "x"}, "stage": "evaluate"}'
    )
    (tmp_path / "a.json").write_text('{"loss": {"final": 0.123456}}')
    (tmp_path / "c.json").write_text('["no object"]')
    (tmp_path / "d.json").write_text('{"torn"')
    (tmp_path / "e.json").write_text('{"metrics": {"words": "only"}}')
    assert [(run.name, run.figures) for run in read_runs(tmp_path)] == [
        ("a", {"loss.final": "0.1235"}),
        ("B", {"tr@1": "5"}),
    ]


def test_deeply_nested_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100_000)
    assert read_json(tmp_path / "x.json") == {}


def test_figures_flatten_with_intervals_as_one() -> None:
    value = {
        "a": {"b": 1},
        "ci": {"value": 12.34, "low": 10, "high": 13.5, "level": 0.95},
        "no": True,
        "nan": float("nan"),
    }
    assert list(shown_figures(value)) == [("a.b", "1"), ("ci", "12.34 [10, 13.5]")]
    assert list(shown_figures(0.25)) == [("", "0.25")]


def test_leaves_keep_every_value() -> None:
    value = {"options": {"by": "itm_score", "sources": ["web", "human"], "none": []}, "version": 1}
    assert list(leaves(value)) == [
        ("options.by", ["itm_score"]), ("options.sources", ["web", "human"]), ("options.none", []), ("version", [1]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (1234567, "1,234,567"), (0.66, "0.66"), (12.3456, "12.35"), (1234.56, "1,235"), (0.00012, "0.00012"),
        (3e-7, "3e-07"), (float("nan"), "–"), (float("inf"), "–"), (-0.5, "-0.5"), (0.97131, "0.9713"), (1e20, "1e+20"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_figure_is_shown_with_its_interval(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "metrics": {"tr@1": 12.5, "cider": 30.0, "odd": 1.0},
                "intervals": {"tr@1": {"value": 12.5, "low": 10.0, "high": 15.0}, "odd": {"low": 1}, "cider": None},
            }
        )
    )  # fmt: skip
    (found,) = read_runs(tmp_path)
    assert found.figures == {"tr@1": "12.5 [10, 15]", "cider": "30", "odd": "1"}
