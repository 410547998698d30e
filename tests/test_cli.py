"""Catches a command that answers a wrong call with a traceback, another exit code than 2, or files left behind."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml

from capfilt import cli
from capfilt.execution.run import Summary
from capfilt.resources import list_recipes
from capfilt.stages.registry import STAGES
from capfilt.tables.shards import Part
from capfilt.tables.visible import say
from capfilt.tables.workspace import Workspace
from tests.refusals import names
from tests.worlds import image_rows, tiny_checkpoint, write_images


def capfilt(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "capfilt", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip


@pytest.fixture
def call(tmp_path, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""
    from capfilt.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@pytest.fixture
def workspace(tmp_path):
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4), image_rows("web", 3, start=10)])
    tiny_checkpoint(place.model("captioner"), seed=1)
    tiny_checkpoint(place.model("filter"), seed=2)
    return place


@pytest.mark.parametrize("words", [command.words for command in STAGES])
def test_every_stage_has_help_with_an_example(call, words):
    code, out, _ = call(*words, "--help")
    assert code == 0
    assert f"capfilt {' '.join(words)}" in out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "--imgs", "web"], "--images"),
        (["caption"], "--images"),
        (["captoin"], "captoin"),
        (["caption", "--images", "web", "--top-p", "much"], "--top-p"),
        (["caption", "--images", "nowhere"], "nowhere"),
        (["caption", "--images", "web", "--captioner", "nowhere"], "nowhere"),
        (["caption", "--images", "web", "--execution", "cloud"], "cloud"),
        (["run", "nowhere"], "nowhere"),
        (["recipe", "show", "nowhere"], "nowhere"),
        (["recipe", "show", "quickstart", "--set", "seed=1"], "--resolved"),
        (["recipes"], "recipes"),
        (["quickstart", "--size", "huge"], "huge"),
        (["select", "--images", "web", "--scores", "nowhere"], "nowhere"),
        (["query", "SELEC 1"], "SELEC"),
        (["doctor", "-w", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_call_is_one_line_exit_2_and_nothing_written(
    call, workspace, monkeypatch, arguments, message
):
    monkeypatch.chdir(workspace.path)
    before = sorted(workspace.path.rglob("*"))
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("capfilt: ")
    assert message in err
    assert sorted(workspace.path.rglob("*")) == before


def test_recipes_are_listed_and_shown_as_written_or_resolved(call):
    code, out, _ = call("recipe", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list_recipes()
    code, written, _ = call("recipe", "show", "blip-base-14m")
    assert code == 0
    assert "# " in written
    code, resolved, _ = call("recipe", "show", "blip-base-14m", "--resolved", "--set", "seed=5")
    assert code == 0
    first = yaml.safe_load(resolved)["stages"][0]["options"]
    assert (first["seed"], first["preset"], first["precision"]) == (5, "base", "fp32")
    assert first["vision_init"] == "${vision_init}"


def test_underscores_are_hyphens(call, workspace):
    code, _, err = call(
        "caption",
        "--images",
        "web",
        "--max_new_tokens",
        "3",
        "-w",
        str(workspace.path),
        "--execution",
        "inline",
        "-q",
    )
    assert code == 0, err
    assert workspace.part("captions", "captioner").rows == 7


def test_bootstrap_by_commands_and_out_as_a_path(call, workspace, tmp_path):
    shared = ["-w", str(workspace.path), "--execution", "inline", "-q"]
    assert call("caption", "--images", "web", "--max-new-tokens", "4", *shared)[0] == 0
    out = str(tmp_path / "elsewhere" / "scores")
    code, printed, _ = call("score", "--images", "web", "--captions", "captioner", "--out", out, *shared)
    assert code == 0
    assert "14 in = " in printed
    code, printed, _ = call(
        "select",
        "--images",
        "web",
        "--captions",
        "captioner",
        "--scores",
        out,
        "--threshold",
        "0",
        "--no-pairs",
        *shared,
    )
    assert code == 0
    assert not workspace.part("pairs", "capfilt").exists
    code, printed, _ = call(
        "query",
        "SELECT count(*) AS n FROM verdicts WHERE keep",
        "--format",
        "json",
        "-w",
        str(workspace.path),
    )
    assert code == 0
    assert json.loads(printed)[0]["n"] == workspace.part("verdicts", "capfilt").counts().kept
    assert call("report", "-w", str(workspace.path), "--out", str(tmp_path / "r.html"))[0] == 0
    code, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
    assert code == 0
    assert "BAD" not in printed


def test_doctor_finds_a_damaged_shard_and_exits_1(call, workspace):
    path = workspace.part("images", "web").path / "00001.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    code, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
    assert code == 1
    assert "00001.parquet" in printed


def test_doctor_goes_on_past_a_manifest_that_cannot_be_read(call, workspace):
    """Catches a check of many parts that ends at the first damage."""
    part = workspace.part("images", "web")
    path = part.path
    (part.record / "00000.manifest.json").write_text("{")
    data = bytearray((path / "00001.parquet").read_bytes())
    data[200] ^= 1
    (path / "00001.parquet").write_bytes(data)
    code, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
    assert code == 1
    assert "00000.manifest.json" in printed
    assert "00001.parquet" in printed


def test_doctor_finds_damaged_checkpoints_and_lists_what_killed_trainings_left(call, workspace):
    """Catches a doctor that looks at shards alone; and leftovers that stay after the training was run again."""
    models = workspace.path / "models"
    for name in (
        "pretrained/.partial-a/model.safetensors",
        "pretrained/best/.tmpAbc",
        ".partial-b/made/config.json",
    ):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).write_bytes(b"half")
    code, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
    assert code == 0
    assert "pretrained: no checkpoint yet" in printed
    assert "2 leftovers of a killed training (safe to delete: .partial-a, best/.tmpAbc)" in printed
    assert f"{models}/.partial-b: left by a killed export" in printed
    tiny = ["--preset", "tiny", "--steps", "1", "--batch-size", "2", "--image-size", "32"]
    assert (
        call("pretrain", "--web", "web", *tiny, "-w", str(workspace.path), "--execution", "inline", "-q")[0]
        == 0
    )
    _, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
    assert "killed training" not in printed
    for name in ("model.safetensors", "config.json"):
        path = models / "captioner" / name
        path.write_bytes(path.read_bytes()[:-2] + b"??")
        code, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
        assert code == 1
        assert f"BAD   {path}" in printed


def test_doctor_finds_what_changed_beside_shards_and_checkpoints(call, workspace):
    """Best and averaged weights, states and settled precisions passed `doctor --verify` whatever their bytes were."""
    from capfilt.training import state

    torch = pytest.importorskip("torch")
    trained = workspace.path / "models" / "trained"
    tiny_checkpoint(trained / "best", seed=3)
    tiny_checkpoint(trained / "live", seed=4)
    for name in ("state.safetensors", "state-00000002.safetensors"):
        state.write(trained / name, {"x": torch.ones(3)}, {"step": 2})
    workspace.part("images", "web").settle("precision", "fp32")
    record = workspace.part("images", "web").record
    assert call("doctor", "-w", str(workspace.path), "--verify")[0] == 0
    files = [*trained.rglob("*.safetensors"), trained / "best" / "config.json", record / "precision.json"]
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        code, printed, _ = call("doctor", "-w", str(workspace.path), "--verify")
        assert code == 1, path
        assert path.name in printed
        path.write_bytes(whole)


def test_doctor_calls_what_a_kill_leaves_unfinished_and_not_bad(call, workspace):
    """A folder that a killed stage had only made, and an index of fewer shards, were called damage."""
    (workspace.path / "captions" / "begun").mkdir(parents=True)
    code, printed, _ = call("doctor", "-w", str(workspace.path))
    assert code == 0
    assert "captions/begun: empty, a run was killed before its first row (safe to delete" in printed
    part = workspace.part("images", "web")
    part.finish()
    (part.record / "00001.manifest.json").rename(workspace.path / "aside")
    part.finish()
    (workspace.path / "aside").rename(part.record / "00001.manifest.json")
    code, printed, _ = call("doctor", "-w", str(workspace.path))
    assert code == 1
    assert "GAP" in printed
    assert "the index is older than the shards: run its stage again" in printed


@pytest.fixture
def completed(workspace, monkeypatch, capsys):
    """What a shell is offered for the last word of a line, in the workspace's folder."""
    monkeypatch.chdir(workspace.path.parent)

    def complete(line: str, shell: str = "bash") -> list[str]:
        told = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (not line.endswith(" ")))}
        if shell != "bash":
            told = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        with monkeypatch.context() as patch:
            for name, value in {"_CAPFILT_COMPLETE": f"complete_{shell}", **told}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit):
                cli.main([])
        return capsys.readouterr().out.split()

    return complete


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("capfilt select --keep", ["--keep-fraction"]),
        ("capfilt recipe show --res", ["--resolved"]),
        ("capfilt caption --method ", ["nucleus", "beam", "greedy"]),
        ("capfilt ingest x --splits t", ["train", "test"]),
        ("capfilt finetune vqa --decay a", ["all"]),
        ("capfilt export x --to o", ["original", "openai"]),
        ("capfilt report --execution ", []),
        ("capfilt select --execution i", ["inline"]),
        ("capfilt caption -w ws --images w", ["web"]),
        ("capfilt score -w ws --captions ", ["made"]),
        ("capfilt score -w ws --filter f", ["filter"]),
        ("capfilt evaluate -w ws --model cap", ["captioner"]),
        ("capfilt compare -w ws ", ["first"]),
        ("capfilt caption -w nowhere --images ", []),
        ("capfilt select -w ws --by ", []),
        ("capfilt run photographs-", ["photographs-gpu"]),
        ("capfilt recipe show blip-base", ["blip-base-129m", "blip-base-14m"]),
    ],
)
def test_a_shell_completes_options_choices_parts_and_recipes(completed, workspace, line, wanted, shell):
    """Catches completion that knows commands alone, that looks in another workspace, or that works in one shell only."""
    (workspace.path / "captions" / "made").mkdir(parents=True)
    (workspace.path / "captions" / ".aside").mkdir()
    (workspace.path / "runs").mkdir()
    (workspace.path / "runs" / "first.json").write_text("{}")
    found = completed(line, shell)
    if shell == "bash":
        assert found == wanted
    assert all(any(word in each for each in found) for word in wanted)


def test_the_workspace_of_a_completion_may_come_from_the_environment(completed, workspace, monkeypatch):
    monkeypatch.setenv("CAPFILT_WORKSPACE", str(workspace.path))
    assert completed("capfilt duplicates --images ") == ["web"]


def test_a_closed_pipe_is_not_a_failure(workspace):
    process = subprocess.run(
        f"{sys.executable} -m capfilt caption --help | head -1",
        shell=True, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert "Traceback" not in process.stderr


def test_the_version_and_the_module(tmp_path):
    process = capfilt("--version", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout.startswith("capfilt 0.")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_one_line_and_the_state_is_saved(tmp_path, ranks):
    """A traceback, another exit code, or a run that begins anew."""
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "human"), [image_rows("human", 8, source="human", split="train")])
    arguments = (
        "pretrain", "--human", "human", "--preset", "tiny", "--vocab-size", "60", "--steps", "100000",
        "--batch-size", "4", "--queue-size", "0", "--momentum", "0", "--ranks", str(ranks),
        "--execution", "inline", "-w", str(place.path),
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", *arguments], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    log = place.model("pretrained") / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith("capfilt: interrupted")
    assert "Traceback" not in said
    assert (place.model("pretrained") / "state.safetensors").is_file()


ESC = "\x1b]0;owned\x07\x1b[31m"


def hostile(out: str) -> list[str]:
    """The characters that a terminal obeys."""
    return [
        character
        for character in out
        if (character < " " and character != "\n") or character in "\x7f\x9b\u202e"
    ]


@pytest.fixture
def one_line(capsys, workspace):
    """Run a command on the workspace in this process: the one line that it ends with, its code being 1."""
    from capfilt.cli import main

    def run(*arguments, code=1):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        err = capsys.readouterr().err.strip()
        assert stopped.value.code == code, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("capfilt: ")
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "named", "words"),
    [
        (["caption", "--images", "web", "--out", "x" * 300], None, None),
        (["caption", "--images", "x" * 300], None, None),
        (["caption", "--images", "web", "--captioner", "x" * 300], None, None),
        (["compare", "x" * 300], None, None),
        (["caption", "--images", "web", "--out", "a/../" * 1000 + "x"], "a/../a", "File name too long"),
        (["recipe", "show", "/proc/self/mem"], "/mem", "Input/output error"),
        (["download", "/proc/self/mem", "--input-format", "txt"], "/proc/self/mem", "Input/output error"),
        (["report", "--out", "file/x/report.html"], "file/x", "Not a directory"),
    ],
)
def test_what_the_operating_system_refuses_is_one_line_and_code_1(
    one_line, workspace, monkeypatch, arguments, named, words
):
    """Catches a traceback for a name too long, a file where a folder should be, a device that cannot be read."""
    monkeypatch.chdir(workspace.path)
    (workspace.path / "file").write_text("")
    if named is None:  # a name that is too long is a user's mistake
        one_line(*arguments, code=2)
        return
    stage = ["--execution", "inline", "-q"] if arguments[0] in ("caption", "download") else []
    told = one_line(*arguments, *stage)
    assert named in told
    assert words in told


def test_a_folder_that_must_not_be_read_or_written_is_one_line_and_code_1(one_line, call, workspace):
    """Catches a traceback of EACCES, from a part, from a checkpoint and from the folder of a report."""
    stage = ["--execution", "inline", "-q", "-w", str(workspace.path)]
    # What is imported on the way is imported by one who may.
    assert call("caption", "--images", "web", *stage)[0] == 0
    assert call("report", "-w", str(workspace.path))[0] == 0
    root = os.geteuid() == 0
    (workspace.path / "images").chmod(0)
    (workspace.path / "models" / "filter").chmod(0)
    workspace.path.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        for arguments in (["caption", "--images", "web", "--out", "b", *stage], ["doctor", "-w", str(workspace.path)],
                          ["score", "--images", "web", *stage], ["report", "-w", str(workspace.path)]):  # fmt: skip
            told = one_line(*arguments)
            assert "Permission denied" in told
            assert str(workspace.path) in told or "pytest-of" in told
    finally:
        if root:
            os.seteuid(0)
        for path in (workspace.path, workspace.path / "images", workspace.path / "models" / "filter"):
            path.chmod(0o755)


@pytest.mark.parametrize(
    "arguments",
    [
        ("subset", "--images", "web", "--dataset", "../x"),
        ("ingest", "web", "--dataset", ESC),
        ("download", "x.csv", "--dataset", "a\nb"),
        ("examples", "x.json", "--images", "web", "--dataset", "-x"),
        ("duplicates", "--images", "web", "--out", "_x"),
        ("caption", "--images", f"./{ESC}"),
        ("evaluate", "--images", "web", "--out", ".x"),
        ("ingest", "web", "--dataset", "web", "--out", f"./{ESC}"),
        ("query", f"SELECT '{ESC}", "--format", "csv"),
        ("run", f"./{ESC}.yaml"),
        ("run", "recipe.yaml"),
        ("recipe", "show", f"{ESC}"),
        ("compare", f"./{ESC}"),
        ("compare", f"runs/{ESC}"),
        (f"{ESC}",),
        ("report", f"--{ESC}"),
        ("ingest", f"{ESC}.json", "--dataset", "web"),
        ("download", f"https://x/{ESC}", "--dataset", "web"),
        ("export", "captioner", "--to", ESC, "--out", "x"),
        ("caption", "--images", "web", "--method", ESC),
        ("query", "", "--format", ESC),
    ],
    ids=str,
)
def test_what_a_line_quotes_is_shown_and_not_sent(call, workspace, monkeypatch, arguments):
    """Would catch: an error that sends a terminal the escapes of a file, a URL or an option that it quotes; a name that
    leads out of the workspace."""
    monkeypatch.chdir(workspace.path)
    (workspace.path / "recipe.yaml").write_text('version: 1\nstages: [{stage: "a\\u202e\\e[31m"}]\n')
    before = sorted(workspace.path.parent.rglob("*"))
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert hostile(err) == []
    assert len(err.splitlines()) == 1
    assert sorted(workspace.path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("ingest", "~nosuchuser/x", "--dataset", "a"),
        ("download", "~nosuchuser/x.txt", "--dataset", "a"),
        ("duplicates", "--images", "~nosuchuser/x"),
        ("examples", "~nosuchuser/x.json", "--dataset", "a", "--images", "web"),
        ("ingest", "x", "--dataset", "a", "--out", "~nosuchuser/x"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_home_of_nobody_is_no_traceback(call, workspace, monkeypatch, arguments):
    monkeypatch.chdir(workspace.path)
    code, _, err = call(*arguments)
    assert code == 2
    assert names(err, "~nosuchuser")


def test_what_the_system_refuses_is_shown_and_not_sent(call, workspace):
    place = workspace.path / ESC.replace("/", "")
    place.mkdir()
    (place / "images").write_text("a file")
    code, _, err = call("ingest", str(workspace.path / "models"), "--dataset", "q", "-w", str(place))
    assert code in (1, 2)
    assert hostile(err) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_csv_and_a_recipe_are_shown_to_a_terminal_and_raw_in_a_pipe(call, workspace, monkeypatch, tmp_path):
    """Would catch: escapes of the web obeyed by a terminal, or a file in which a text is not the text any more."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# a\u202eb\nversion: 1\nstages: []\n")
    sql = "SELECT 'a' || chr(27) || '[31m' || chr(10) AS t, '\u202e' AS \"\u202en\""
    queried = ("query", sql, "--format", "csv", "-w", str(workspace.path))
    shown = ("recipe", "show", str(recipe))
    assert call(*queried)[1] == 't,\u202en\r\n"a\x1b[31m\n",\u202e\r\n'
    assert call(*shown)[1] == recipe.read_text()
    for arguments, words in ((queried, "a\\u001b[31m\\n"), (shown, "# a\\u202eb\nversion: 1\n")):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        call(*arguments)
        monkeypatch.undo()
        assert hostile(terminal.getvalue().replace("\r\n", "\n")) == []
        assert words in terminal.getvalue()


def test_remarks_doctor_and_tables_show_what_they_quote(call, tmp_path, capsys):
    """Would catch: a host, a folder or a run that colours the terminal from a summary, a check or a comparison."""
    place = Workspace(tmp_path / "w")
    write_images(Part(place.path / "images" / f"a{ESC}"), [image_rows("web", 1)])
    (place.path / "runs").mkdir()
    result = {"name": ESC, "metrics": {ESC: 1.0}, "tasks": {ESC: {"protocol": ESC, "metrics": [ESC]}}}
    (place.path / "runs" / "r.json").write_text(json.dumps(result))
    for arguments in (
        ("doctor",),
        ("compare", "r"),
        ("compare", "r", "r", "--format", "markdown"),
        ("compare", "r", "--format", "json"),
        ("query",),
        ("query", "FROM parts"),
    ):
        code, out, err = call(*arguments, "-w", str(place.path))
        assert (code, hostile(out + err)) == (0, []), arguments
    summary = Summary("download", ESC, 1.0, done_now=1, figures={ESC: 1}, table=[ESC])
    say(*summary.lines())
    assert hostile(capsys.readouterr().out) == []


def test_warnings_and_tracebacks_are_shown_too(tmp_path):
    """Would catch: what Python itself prints, for which no line of ours is asked."""
    code = f"""
import warnings
from capfilt import cli
def run(arguments):
    warnings.warn({ESC!r})
    raise ValueError({ESC!r})
cli._run = run
cli.main([])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.count("\\u001b[31m") == 2
    assert done.stderr.startswith(
        "capfilt: warning: \\u001b]0;owned\\u0007\\u001b[31m (UserWarning, <string>:5)\n"
    )
    assert hostile(done.stderr) == []
    assert done.returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "--images", "web"],
        ["pretrain", "--web", "web", "--preset", "tiny", "--steps", "1", "--batch-size", "2"],
        ["pretrain", "--web", "web", "--preset", "tiny", "--steps", "2", "--batch-size", "2", "--save-every", "1"],
        ["report"],
    ],
    ids=["part", "checkpoint", "state", "report"],
)  # fmt: skip
def test_a_file_that_may_not_grow_is_one_line_and_code_1(one_line, workspace, arguments):
    """Catches a traceback of EFBIG, from the writers of Parquet, of safetensors and of text."""
    stage = ["--execution", "inline", "-q"] if arguments[0] != "report" else []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        told = one_line(*arguments, *stage, "-w", workspace.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in told
    assert not [path for path in workspace.path.rglob("*") if path.name.startswith((".partial-", ".tmp"))]


def test_a_machine_without_memory_is_one_line_and_code_1(one_line, monkeypatch, workspace):
    monkeypatch.setattr("capfilt.doctor.machine", lambda: [" " * 2**62])
    assert "not enough memory" in one_line("doctor")


@pytest.mark.parametrize(
    ("category", "text", "line"),
    [
        (RuntimeWarning, "step 2: loss not finite", "capfilt: warning: step 2: loss not finite\n"),
        (UserWarning, "two\n  lines", "capfilt: warning: two lines (UserWarning, /lib/x.py:7)\n"),
        (DeprecationWarning, "old", "capfilt: warning: old (DeprecationWarning, /lib/x.py:7)\n"),
        (FutureWarning, "new\x1b", "capfilt: warning: new\\u001b (FutureWarning, /lib/x.py:7)\n"),
    ],
)
def test_a_warning_is_one_line_that_says_so(monkeypatch, category, text, line):
    """Would catch: a library's warning of three lines, with its source; a warning that reads like an error."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    cli._show_all()
    assert warnings.formatwarning(text, category, "/lib/x.py", 7, "source = 1") == line
