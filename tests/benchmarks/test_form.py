"""Would catch: a benchmark that exits 0 on a missed target, JSON with NaN in it or without a promised key, a median
ratio upside down, and a benchmark that does not run as the plain script it is documented as."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KEYS = {"benchmark", "command", "commit", "machine", "versions", "seed", "figures", "targets"}


@pytest.fixture(scope="module")
def form():
    spec = importlib.util.spec_from_file_location("_form", BENCHMARKS / "_form.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_form"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_form"]


def run(form, body, *words):
    with pytest.raises(SystemExit) as stopped:
        form.main("A benchmark.", body, argv=["benchmarks/some.py", *words])
    return stopped.value.code


def test_targets_decide_the_exit_status_and_everything_is_written(form, tmp_path, capsys):
    def body(args, record):
        assert args.quick
        assert args.seed == 7
        record.figure("rows", 123456)
        record.target("seconds", 2.5, "<=", 60)
        record.target("rate", 10, ">=", 11)

    assert run(form, body, "--quick", "--seed", "7", "--json", str(tmp_path / "deep" / "x.json")) == 1
    result = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert set(result) == KEYS
    assert result["benchmark"] == "some"
    assert result["command"].startswith("python benchmarks/some.py --quick --seed 7 --json ")
    assert result["seed"] == 7
    assert result["figures"] == {"rows": 123456.0, "seconds": 2.5, "rate": 10.0}
    assert result["targets"] == {
        "seconds": {"value": 2.5, "target": "<= 60", "met": True},
        "rate": {"value": 10.0, "target": ">= 11", "met": False},
    }
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["memory_gib"] > 0
    assert result["versions"]["python"] == sys.version.split()[0]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]
    shown = capsys.readouterr().out
    assert "123,456" in shown
    assert "NOT MET" in shown


def test_met_targets_exit_with_nothing(form, capsys):
    assert run(form, lambda args, record: record.target("ok", 1, "==", 1)) == 0
    assert run(form, lambda args, record: record.figure("only", 1)) == 0


def test_a_figure_that_is_not_a_number_is_null_and_meets_no_target(form, tmp_path, capsys):
    file = tmp_path / "x.json"
    assert (
        run(form, lambda args, record: record.target("gone", float("nan"), "<=", 1), "--json", str(file)) == 1
    )
    result = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert result["figures"]["gone"] is None
    assert result["targets"]["gone"] == {"value": None, "target": "<= 1", "met": False}


def test_names_are_used_once_and_comparisons_are_known(form):
    record = form.Record()
    record.figure("a", 1)
    record.target("a", 1, "<=", 1)
    with pytest.raises(ValueError, match="'a'"):
        record.figure("a", 2)
    with pytest.raises(ValueError, match="'a'"):
        record.target("a", 2, "<=", 1)
    with pytest.raises(ValueError, match="=>"):
        record.target("b", 2, "=>", 1)


def test_a_wrong_option_exits_with_2(form, capsys):
    assert run(form, lambda args, record: pytest.fail("ran"), "--fast") == 2


def test_own_options_come_beside_the_shared_ones(form, capsys):
    seen = []
    with pytest.raises(SystemExit):
        form.main(
            "A benchmark.",
            lambda args, record: seen.append(args.images),
            lambda parser: parser.add_argument("--images", type=int, default=3),
            argv=["some.py", "--images", "9"],
        )
    assert seen == [9]


def test_the_ratio_says_how_many_times_longer_the_second_takes(form):
    order = []

    def fast():
        order.append("fast")
        time.sleep(0.002)

    def slow():
        order.append("slow")
        time.sleep(0.02)

    pairs = form.in_pairs(fast, slow, 3)
    assert order == ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert len(pairs.first) == len(pairs.second) == 3
    assert pairs.ratio > 2
    assert form.Pairs([1.0, 2.0, 4.0], [3.0, 2.0, 8.0]).ratio == 2.0


def test_peak_memory_sees_what_was_held(form):
    with form.peak_memory() as small:
        pass
    with form.peak_memory() as large:
        held = bytearray(b"x") * (200 << 20)
        del held
    assert large.gib > small.gib + 0.15


def test_the_retrieval_benchmark_runs_as_a_script_and_meets_its_targets(tmp_path):
    file = tmp_path / "retrieval.json"
    command = [sys.executable, str(BENCHMARKS / "retrieval.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert set(result) == KEYS
    assert result["targets"]
    assert all(target["met"] for target in result["targets"].values())
    assert result["figures"]["tr@1"] > 50
