"""`capfilt download` beside img2dataset alone, over the same URLs of a server on the loopback: processor time per image.

The server is a process of its own and counted in neither. Each tool runs as a process as its users start it, one worker,
32 threads, Parquet out, in turn: that is the rate with start-up (imports included). Without: each tool in a process that
has its imports and a first shard behind it, shard after shard in turn, its children counted. Processor time and not the
clock: rates per core, which hold on a busy machine too. Ours also checks addresses and sizes, and takes a
perceptual hash.

`--urls N` instead: one run of ours over N URLs (200,000 for the claim that memory is flat; half an hour), with the most
resident memory of driver and child in its first and its second half.
"""

from __future__ import annotations

import argparse
import http.server
import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _form import ROOT, Record, main
from PIL import Image

from capfilt.tables.shards import Part

PICTURES = 64
THREADS = 32

# img2dataset's own command line, without `fire`; its pool of one process, as `--processes_count 1` starts it.
THEIRS = f"""
import sys
from img2dataset import download
if __name__ == "__main__":
    urls, out, size = sys.argv[1:]
    download(url_list=urls, output_folder=out, input_format="parquet", url_col="url", caption_col="caption",
             output_format="parquet", processes_count=1, thread_count={THREADS}, number_sample_per_shard=1000,
             image_size=int(size), resize_mode="keep_ratio", resize_only_if_bigger=True, retries=0, timeout=10,
             compute_hash="sha256", enable_wandb=False)
"""


def pictures(seed: int) -> list[bytes]:
    """JPEGs of 640 x 480 with detail at three scales, about as large as photographs of that size."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(PICTURES):
        total = np.zeros((480, 640, 3), np.float32)
        for cells, strength in ((8, 90.0), (64, 40.0), (256, 12.0)):
            coarse = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            layers = [
                Image.fromarray(coarse[..., c]).resize((640, 480), Image.Resampling.BICUBIC) for c in range(3)
            ]
            total += np.stack([np.asarray(layer) for layer in layers], axis=2)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


class _Handler(http.server.BaseHTTPRequestHandler):
    bodies: list[bytes]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.bodies[int(self.path[1:]) % len(self.bodies)]
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(folder: Path) -> None:
    """Serve the folder's pictures until standard input ends; prints the port."""
    _Handler.bodies = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


def write_list(path: Path, port: int, count: int) -> Path:
    """A list of `count` URLs of the server."""
    urls = [f"http://127.0.0.1:{port}/{number}" for number in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": [f"text {number}" for number in range(count)]}), path)
    return path


def ours(urls: Path, out: Path, port: int, size: int) -> list[str]:
    """The command line of ours."""
    words = ["download", str(urls), "--out", str(out), "--execution", "inline", "--quiet"]
    words += ["--allow-host", f"127.0.0.1:{port}", "--image-size", str(size), "--thread-count", str(THREADS)]
    return [sys.executable, "-m", "capfilt", *words]


def environment() -> dict[str, str]:
    """For both tools: this checkout, one thread of arithmetic, no calls home."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


def cost(command: list[str]) -> float:
    """Processor seconds of a command and of every process it waited for."""
    before = os.times()
    done = subprocess.run(command, check=False, env=environment(), capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{command[1:4]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def good_rows(folder: Path) -> int:
    """How many pictures a tool stored."""
    tables = [pq.read_table(path, columns=["status"]) for path in folder.glob("[0-9]*.parquet")]
    return sum(table["status"].to_pylist().count("success") for table in tables)


# Both answer a line on standard input with the processor seconds that one more shard took them.
OURS_WARM = """
import os, sys, time
from pathlib import Path
from capfilt.execution.commit import process_and_commit
from capfilt.stages.download.stage import Download
from capfilt.stages.download.worker import shared_worker
from capfilt.stages.download import DownloadOptions
from capfilt.tables.workspace import Workspace
urls, out, size, threads, rows, port = sys.argv[1:]
stage = Download(DownloadOptions(url_list=urls, image_size=int(size), thread_count=int(threads),
                                 number_sample_per_shard=int(rows), allow_host=(f"127.0.0.1:{port}",)), Workspace(out))
mark = stage.begin()
stage.setup()
def spent():
    words = Path(f"/proc/{shared_worker().pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
for shard, _ in enumerate(sys.stdin):
    before = spent()
    kept = process_and_commit(stage, mark, shard).counts.kept
    print(spent() - before, kept, flush=True)
"""
THEIRS_WARM = """
import os, sys, time
import pyarrow as pa, pyarrow.parquet as pq
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import ParquetSampleWriter
urls, out, size, threads, rows, port = sys.argv[1:]
os.makedirs(out)
table, rows = pq.read_table(urls), int(rows)
resizer = Resizer(image_size=int(size), resize_mode="keep_ratio", resize_only_if_bigger=True)
download = Downloader(ParquetSampleWriter, resizer, int(threads), True, False, out, ["url", "caption"], 10, rows, 5,
                      "sha256", None, "jpg", 0, None, ["noai", "noimageai", "noindex", "noimageindex"])
for shard, _ in enumerate(sys.stdin):
    part = f"{out}/{shard}.feather"
    with pa.OSFile(part, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.slice(shard * rows, rows))
    before = time.process_time()
    download((shard, part))
    kept = pq.read_table(f"{out}/{shard:05d}.parquet", columns=["status"])["status"].to_pylist().count("success")
    print(time.process_time() - before, kept, flush=True)
"""


class Warm:
    """A tool that waits for shards."""

    def __init__(self, script: str, words: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *words],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def shard(self) -> tuple[float, int]:
        """Processor seconds and stored pictures of the next shard."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        # Libraries may say something first.
        while True:
            words = self._process.stdout.readline().split()
            if not words:
                raise RuntimeError("a tool ended before its shards did")
            if len(words) == 2 and words[1].isdigit():
                return float(words[0]), int(words[1])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def steady(root: Path, port: int, args: argparse.Namespace, record: Record) -> None:
    """Shards in turn, both tools warm."""
    rows, shards = (100, 3) if args.quick else (500, 2 * args.rounds)
    urls = write_list(root / "warm.parquet", port, rows * (shards + 1))
    tools = {
        tool: Warm(script, [str(urls), str(root / f"warm-{tool}"), str(args.image_size), str(THREADS), str(rows), str(port)])
        for tool, script in (("capfilt", OURS_WARM), ("img2dataset", THEIRS_WARM))
    }  # fmt: skip
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    missing = 0
    try:
        for turn in range(shards + 1):
            for tool in tools if turn % 2 else reversed(tools):
                spent, kept = tools[tool].shard()
                missing += rows - kept
                if turn:
                    seconds[tool].append(spent)
    finally:
        for each in tools.values():
            each.close()
    record.target("warm_images_missing", missing, "==", 0)
    for tool, each in seconds.items():
        record.figure(f"{tool}_images_per_core_second", rows / statistics.median(each))
    ratios = [b / a for a, b in zip(seconds["capfilt"], seconds["img2dataset"], strict=True)]
    if args.quick:
        # Three short shards swing with the machine.
        record.figure("times_the_rate", statistics.median(ratios))
    else:
        record.target("times_the_rate", statistics.median(ratios), ">=", 1.0)


def compare(root: Path, port: int, args: argparse.Namespace, record: Record) -> None:
    """Both tools as their users start them, in turn."""
    count, rounds = (200, 1) if args.quick else (2000, args.rounds)
    urls = write_list(root / "cold.parquet", port, count)
    script = root / "theirs.py"
    script.write_text(THEIRS)
    seconds: dict[str, list[float]] = {"capfilt": [], "img2dataset": []}
    missing = 0
    for turn in range(rounds):
        for tool in ("capfilt", "img2dataset") if turn % 2 else ("img2dataset", "capfilt"):
            out = root / f"{tool}-{turn}"
            theirs = [sys.executable, str(script), str(urls), str(out), str(args.image_size)]
            seconds[tool].append(
                cost(ours(urls, out, port, args.image_size) if tool == "capfilt" else theirs)
            )
            missing += count - good_rows(out)
    record.target("cold_images_missing", missing, "==", 0)
    for tool, each in seconds.items():
        record.figure(f"{tool}_images_per_core_second_with_start_up", count / statistics.median(each))
    ratios = [b / a for a, b in zip(seconds["capfilt"], seconds["img2dataset"], strict=True)]
    record.target("times_the_rate_with_start_up", statistics.median(ratios), ">=", 1.0)


def resident(pid: int) -> int:
    """Resident bytes of a process and of its children."""
    total = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident(int(child)) for child in (thread / "children").read_text().split())
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        return total + next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return total


def flat(root: Path, port: int, args: argparse.Namespace, record: Record) -> None:
    """One run over many URLs, its memory watched."""
    urls = write_list(root / "many.parquet", port, args.urls)
    out = root / "many"
    process = subprocess.Popen(ours(urls, out, port, args.image_size), cwd=ROOT, stdout=subprocess.DEVNULL)
    shards = -(-args.urls // 1000)
    peaks = [0, 0]
    while process.poll() is None:
        done = len(Part(out).shards())
        half = int(2 * done >= shards)
        peaks[half] = max(peaks[half], resident(process.pid))
        time.sleep(0.2)
    record.target("exit_status", process.returncode, "==", 0)
    record.target("images_missing", args.urls - good_rows(out), "==", 0)
    record.figure("peak_gib_first_half", peaks[0] / 2**30)
    record.figure("peak_gib_second_half", peaks[1] / 2**30)
    record.target("growth", peaks[1] / peaks[0], "<=", 1.1)


def measure(args: argparse.Namespace, record: Record) -> None:
    """The comparison, or the long run."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for number, body in enumerate(pictures(args.seed)):
            (root / f"{number:03d}.jpg").write_bytes(body)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            for part in (flat,) if args.urls else (compare, steady):
                part(root, port, args, record)
        finally:
            server.kill()
            server.wait()


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument(
        "--image-size", type=int, default=256, help="stored pictures' shorter side (default 256)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool (default 3)")
    parser.add_argument("--urls", type=int, default=0, help="one long run over so many, its memory watched")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        main(__doc__, measure, options)
