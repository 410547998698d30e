"""Every stage killed at every operation on its workspace, and run again: `just crash-sweep`.

    python tests/sweeps/crash.py [--stages ingest,select] [--every N]

A stage is run once to the end, and its operations are counted (`disk.py`). Then, for each, it is killed before it, and in
the middle of it where it is a write; the workspace is looked at, and the stage run again. Asked of each kill:

    after it         the folders of parts hold whole Parquet files and nothing else; `doctor` names every file that no
                     record or manifest speaks for, and finds no damage
    after the rerun  every file is what it is after a run that nothing killed, byte for byte (seconds excepted); `doctor
                     --verify` finds the workspace whole

Exits 1 when one of them is not so. Nothing here is a test of the suite; `test_sweeps.py` runs it over two stages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa
import pyarrow.parquet as pq

import capfilt
from capfilt import doctor
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.shards import RECORDS
from capfilt.tables.workspace import Workspace
from tests.stages.download.web import Server
from tests.sweeps.disk import Disk

TRAINED = "--preset tiny --steps 6 --batch-size 2 --image-size 32 --keep-best --ema 0.9 --save-every 2 --keep-states 2"


@dataclass(frozen=True)
class Case:
    """One command to kill.

    Attributes:
        command: its words, after `capfilt`; {sources} and {port} are filled in.
        before: commands that made what it reads.
        models: whether it reads a checkpoint.
        changed: something that happens between them and it.
    """

    name: str
    command: str
    before: tuple[str, ...] = ()
    models: bool = False
    changed: Callable[[], None] = field(default=lambda: None)


DOWNLOAD = (
    "download {sources}/urls.csv --dataset fetched --number-sample-per-shard 2 --allow-host 127.0.0.1:{port}"
)
CAPTION = "caption --images web --captioner captioner"
BOTH = f"{CAPTION} --filter filter"
CALIBRATE = "calibrate --images web --filter filter --calibration held --bank 4 --negatives 2 --resamples 20"
SCORE = "score --images web --captions captioner --filter filter"


def cases(server) -> list[Case]:
    """Every stage that writes, the simple ones first."""

    def heals() -> None:
        server.failing = False

    def logs_often() -> None:
        from capfilt.stages import training

        training.LOG_EVERY = 2  # so that the best weights are saved over older ones

    return [
        Case("ingest", "ingest {sources}/folder --dataset found --source web --shard-size 2"),
        Case("subset", "subset web --dataset part --wrong 0.5 --role web"),
        Case("duplicates", "duplicates --images web"),
        Case("examples", "examples {sources}/questions.jsonl --images web --dataset questions"),
        Case("caption", CAPTION, models=True),
        Case("score", SCORE, (CAPTION,), models=True),
        Case("caption --filter", BOTH, models=True),
        Case("select", "select --images web --captions captioner --threshold 0.2", (BOTH,), models=True),
        Case("calibrate", CALIBRATE, models=True),
        Case("download", DOWNLOAD),
        Case("download --retry", "download --dataset fetched --retry failed", (DOWNLOAD,), changed=heals),
        Case("pretrain", f"pretrain --web web --out trained {TRAINED}", changed=logs_often),
    ]


# -- the world ----------------------------------------------------------------------------------------------------------


def make_world(place: Path, models: bool) -> None:
    """A workspace with two shards of pictures and, asked for, a captioner and a filter."""
    from tests.worlds import failed_row, image_rows, tiny_checkpoint, write_images

    workspace = Workspace(place)
    shards = [[*image_rows("web", 3), failed_row("web", "lost")], image_rows("web", 2, start=20, texts=2)]
    for number, row in enumerate(row for rows in shards for row in rows):
        row["phash"] = f"{number // 2:016x}" if row["status"] == "success" else None
    write_images(workspace.part("images", "web"), shards)
    write_images(workspace.part("images", "held"), [image_rows("held", 52, source="human")])
    if models:
        tiny_checkpoint(workspace.model("captioner"), seed=1)
        # One vision tower, as `caption --filter` asks for.
        tiny_checkpoint(workspace.model("filter"), seed=1)


def make_sources(sources: Path, port: int) -> None:
    """What ingest, examples and download read."""
    from tests.worlds import jpeg

    folder = sources / "folder"
    folder.mkdir(parents=True)
    lines = []
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg("red", seed=number) if number != 2 else b"no picture")
        lines.append(json.dumps({"file_name": f"{number}.jpg", "text": f"a red square {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    questions = [
        {"image": f"{number:05d}", "question": "what is it", "answers": ["red"]} for number in (0, 1, 2, 99)
    ]
    (sources / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    addresses = [f"http://127.0.0.1:{port}/{name}" for name in ("good", "big", "cut", "png")]
    (sources / "urls.csv").write_text("url,caption\n" + "".join(f"{each},a text\n" for each in addresses))


# -- one run in a process of its own ------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a fork that does `work`: what it imports, opens and breaks is its own."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        os.setpgid(0, 0)
        work()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:  # noqa: BLE001 - a fork never returns into its parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def called(words: str, place: Path) -> None:
    from capfilt.cli import main

    with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: PTH123
        main([*words.split(), "-w", str(place), "--execution", "inline", "-q"])


# -- what is asked --------------------------------------------------------------------------------------------------------


def contents(place: Path) -> dict[str, bytes]:
    """Every file of a workspace that a run leaves for good, without what tells of time."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_dir() or name.endswith((".tmp", ".stats.json")):
            continue
        data = path.read_bytes()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([[line["step"], line["loss"]] for line in lines]).encode()
        elif path.name == "config.json":
            config = json.loads(data)
            config["files"].pop("log.jsonl", None)
            config.pop("sealed", None)
            for figure in ("seconds", "images_per_second"):
                config["extra"].get("figures", {}).pop(figure, None)
            data = json.dumps(config, sort_keys=True).encode()
        found[name] = data
    return found


def looked_at(place: Path, before: set[str], *, ended: bool) -> Iterator[str]:
    """Everything that is wrong with a workspace, in words; `before`: files that were there before the stage began."""
    lines = list(doctor.workspace(str(place), full=True))
    said = [line for _, line in lines]
    for good, line in lines:
        if not good and (ended or not line.startswith("GAP")):
            yield f"doctor: {line}"
    for table in CONTRACTS:
        for path in sorted((place / table).glob("*/*")):
            if path.suffix != ".parquet" or path.name.startswith("."):
                yield f"{path}: is no shard"
                continue
            try:
                pq.ParquetFile(path).read()
            except (pa.ArrowException, OSError) as error:
                yield f"{path}: no whole Parquet file ({error})"
    for folder, leftovers in torn_files(place).items():
        if set(leftovers) <= before:
            continue
        told = [line for line in said if f" {folder}:" in line]
        names = [
            str(Path(each).relative_to(folder.relative_to(place))) for each in leftovers if "models/" in each
        ]
        count = f"{len(leftovers)} files of killed attempts"
        if not any(
            "empty, a run was killed" in line
            or (all(name in line for name in names) if names else count in line)
            for line in told
        ):
            yield f"{folder}: of {leftovers} doctor tells nothing"


def torn_files(place: Path) -> dict[Path, list[str]]:
    """What killed runs left, by the folder of the part or checkpoint that it belongs to."""
    found: dict[Path, list[str]] = {}
    for path in sorted(place.rglob("*")):
        inside = path.relative_to(place)
        pieces = inside.parts[1:] if inside.parts[0] == RECORDS else inside.parts
        torn = [
            n for n, piece in enumerate(pieces) if piece.startswith(".") or piece.endswith((".tmp", ".part"))
        ]
        # A folder that was left holds files that nobody needs to name; a lock stays for the next run.
        if torn == [len(pieces) - 1] and path.name != ".lock":
            found.setdefault(place.joinpath(*pieces[:2]), []).append(str(inside))
    return found


@dataclass
class Account:
    """What came of a stage's kills."""

    operations: int = 0
    kills: int = 0
    torn: int = 0
    leftovers: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> str:
        whole = self.kills - len({each.split(":")[0] for each in self.wrong})
        return f"| {name} | {self.operations} | {self.kills} | {self.torn} | {whole} | {self.leftovers} | {len(self.wrong)} |"


HEAD = """| stage | operations | kills | of them inside a write | same bytes, doctor clean | leftovers after the rerun | wrong |
|---|---|---|---|---|---|---|"""


class Sweep:
    """The scratch folder of all tries: one workspace, under one path, made anew from a copy for each."""

    def __init__(self, scratch: Path, server) -> None:
        self.scratch, self.server = scratch, server
        self.place, self.base, self.sources = scratch / "ws", scratch / "base", scratch / "sources"
        self.log, self.report = scratch / "log", scratch / "report"
        assert in_child(lambda: make_sources(self.sources, server.port)) == 0

    def world(self, models: bool) -> Path:
        """The workspace that a stage begins in, made once."""
        place = self.scratch / f"world-{models}"
        if not place.exists():
            assert in_child(lambda: make_world(place, models)) == 0
        return place

    def fresh(self, source: Path) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(source, self.place)

    def words(self, command: str) -> str:
        return command.format(sources=self.sources, port=self.server.port)

    def run(self, command: str, kill_at: int = 0, torn: bool = False, watched: bool = True) -> int:
        def work() -> None:
            if watched:
                Disk(self.place, self.log, kill_at, torn).watch()
            try:
                called(self.words(command), self.place)
            finally:
                self.report.write_text(json.dumps([*sys.modules]))

        return in_child(work)

    def warm(self) -> None:
        """Import here whatever the last run imported, so that every further one is a fork that is ready to go."""
        for name in json.loads(self.report.read_text()):
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def sweep(self, case: Case, every: int) -> Account:
        """Kill one stage everywhere; `every` so many operations only."""
        start = time.monotonic()
        self.server.failing = "retry" in case.name
        self.fresh(self.world(case.models))
        for words in case.before:
            assert self.run(words, watched=False) == 0, words
        case.changed()
        shutil.rmtree(self.base, ignore_errors=True)
        shutil.copytree(self.place, self.base)
        assert self.run(case.command, watched=False) == 0, case.command
        self.warm()
        self.fresh(self.base)
        assert self.run(case.command) == 0, case.command
        operations = self.log.read_text().splitlines()
        clean = contents(self.place)
        before = {str(path.relative_to(self.base)) for path in self.base.rglob("*")}
        account = Account(len(operations))
        for number, operation in enumerate(operations, start=1):
            if (number - 1) % every:
                continue
            for torn in (False, True) if operation.startswith("write") else (False,):
                self.fresh(self.base)
                status = self.run(case.command, number, torn)
                account.kills += 1
                account.torn += torn
                problems = self.outcome(case, clean, before) if os.WIFSIGNALED(status) else ["was not killed"]
                account.leftovers += sum(map(len, torn_files(self.place).values()))
                where = f"{number}{' torn' if torn else ''}, {operation}"
                account.wrong += [f"{where}: {each}" for each in problems]
        account.seconds = time.monotonic() - start
        return account

    def outcome(self, case: Case, clean: dict[str, bytes], before: set[str]) -> list[str]:
        """What is wrong after a kill, and after the run that follows it."""

        def work() -> None:
            problems = list(looked_at(self.place, before, ended=False))
            try:
                called(self.words(case.command), self.place)
            except SystemExit as ended:
                if ended.code:
                    problems.append(f"the rerun ended with {ended.code}")
            problems += looked_at(self.place, before, ended=True)
            self.report.write_text(json.dumps(problems))

        assert in_child(work) == 0
        again = contents(self.place)
        changed = [name for name in sorted({*clean, *again}) if clean.get(name) != again.get(name)]
        return [*json.loads(self.report.read_text()), *(f"{name}: differs" for name in changed)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", help="only these, by name, with commas")
    parser.add_argument("--every", type=int, default=1, help="kill at every N-th operation only")
    asked = parser.parse_args()

    server = Server()
    known = cases(server)
    chosen = asked.stages.split(",") if asked.stages else [case.name for case in known]
    if unknown := {*chosen} - {case.name for case in known}:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(Path(os.path.realpath(scratch)), server)
        print(HEAD, flush=True)
        for case in known:
            if case.name in chosen:
                account = sweep.sweep(case, asked.every)
                print(account.row(case.name), flush=True)
                for each in account.wrong:
                    print(f"    WRONG {each}", file=sys.stderr, flush=True)
                wrong += len(account.wrong)
    server.stop()
    print(
        f"\n{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {version('torch')}, "
        f"pyarrow {pa.__version__}, capfilt {capfilt.__version__}; no seed: every operation is swept"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
