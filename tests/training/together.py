"""Training runs for tests to start in several processes; see `launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from capfilt.data import corpus as corpora
from capfilt.data.corpus import from_images
from capfilt.data.tokenizer import Tokenizer
from capfilt.models.blip import BlipConfig, build
from capfilt.models.pretraining import BlipPretraining, PretrainingConfig
from capfilt.models.ranks import Ranks
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig
from capfilt.training import distributed, loop, throughput
from capfilt.training.loop import TrainConfig, train
from tests.training.grids import pairs


def launch(world: int, out: Path, cases: dict[str, dict]) -> subprocess.CompletedProcess[str]:
    """Trains every case into `out` / its name, in `world` processes through torchrun, or in one without it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    return subprocess.run(
        [*command, "tests.training.together", str(out)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with distributed.joined() as ranks:
        for name, case in json.loads((out / "cases.json").read_text()).items():
            run(out / name, ranks, **case)


def run(
    out: Path, ranks: Ranks, config=None, objective=None, dropout=0.0, recompute=False, shard=False,
    uneven=False, peak=None, signal_at=0, number="SIGTERM", of_rank=0,
) -> None:  # fmt: skip
    """One training run; a signal is sent to one rank, once."""
    out.mkdir(parents=True, exist_ok=True)
    loop.EXPOSED = 7  # fewer than there are: counts travel in pieces
    corpus = from_images([pairs(40)], size=16)
    tokenizer = Tokenizer.train(corpus.texts, 100, min_frequency=1)
    settings = TrainConfig(
        **{"steps": 4, "learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1, **(config or {})}
    )
    text = TextConfig(
        tokenizer.vocab_size, 32, 2, 2, 64, max_positions=30, dropout=dropout, attention_dropout=0.0
    )
    vision = VisionConfig(16, 8, width=32, depth=2, heads=2, hidden=64)
    model = build(BlipConfig(vision=vision, text=text, embed_dim=16), seed=1)
    model.recompute_activations(recompute)
    module = BlipPretraining(model, PretrainingConfig(**{"queue_size": 24, **(objective or {})}), ranks)
    if peak:
        throughput.peak_flops = lambda device: peak

    def batches(start):
        for batch in corpora.batches(
            corpus, tokenizer, 12, seed=3, steps=settings.steps, start_step=start,
            rank=ranks.rank, world=ranks.world, parts=settings.accumulate,
        ):  # fmt: skip
            if signal_at == batch.step + 1 and ranks.rank == of_rank and not (out / "sent").exists():
                (out / "sent").touch()
                os.kill(os.getpid(), getattr(signal, number))
            # A picture that does not decode leaves its rank with fewer texts than the others.
            yield batch.split(len(batch))[0] if uneven and ranks.rank == 1 and batch.step == 1 else batch

    result = train(
        module, batches, settings, log_path=out / "log.jsonl",
        state_path=out / "state.safetensors" if settings.save_every else None,
        examples=len(corpus), ranks=ranks, shard=shard,
    )  # fmt: skip
    average = distributed.gathered(result.average, ranks)
    complete = distributed.unsplit(model, lambda: type(model)(model.config))
    if ranks.rank == 0:
        tensors = {**complete.state_dict(), **{f"average.{name}": each for name, each in average.items()}}
        tensors["queue"] = module.queue.image
        tensors["exposures"] = torch.from_numpy(result.exposures)
        torch.save(tensors, out / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
