"""A training run for tests to start in several processes; see `launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from capfilt.data import corpus as corpora
from capfilt.data.corpus import from_images
from capfilt.data.tokenizer import Tokenizer
from capfilt.models.blip import BlipConfig, build
from capfilt.models.pretraining import BlipPretraining, PretrainingConfig
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig
from capfilt.training import distributed
from capfilt.training.loop import TrainConfig, train
from tests.training.grids import pairs


def launch(world: int, out: Path, **settings) -> subprocess.CompletedProcess[str]:
    """Runs `main` in `world` processes through torchrun, or in one without it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(root),
    }
    return subprocess.run(
        [*command, "tests.training.together", str(out)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def main(out: Path) -> None:
    settings = json.loads((out / "settings.json").read_text())
    torch.set_num_threads(1)
    corpus = from_images([pairs(40)], size=16)
    tokenizer = Tokenizer.train(corpus.texts, 100, min_frequency=1)
    model = build(
        BlipConfig(
            vision=VisionConfig(16, 8, width=32, depth=2, heads=2, hidden=64),
            text=TextConfig(
                tokenizer.vocab_size, 32, 2, 2, 64, max_positions=30,
                dropout=settings.get("dropout", 0.0), attention_dropout=0.0,
            ),
            embed_dim=16,
        ),
        seed=1,
    )  # fmt: skip
    wanted = {"queue_size": 24, **settings.get("objective", {})}
    if "objectives" in wanted:
        wanted["objectives"] = tuple(wanted["objectives"])
    config = TrainConfig(**{"learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1, **settings["config"]})
    model.recompute_activations(settings.get("recompute", False))
    with distributed.joined() as ranks:
        module = BlipPretraining(model, PretrainingConfig(**wanted), ranks)
        marker = out / "killed"

        def on_step(step, values):
            if settings.get("signal_at") == step and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), getattr(signal, settings["signal"]))

        result = train(
            module,
            lambda start: corpora.batches(
                corpus, tokenizer, 12, seed=3, steps=config.steps, start_step=start, rank=ranks.rank,
                world=ranks.world, parts=config.accumulate,
            ),
            config, on_step=on_step, log_path=out / "log.jsonl",
            state_path=out / "state.safetensors" if config.save_every else None, examples=len(corpus),
            ranks=ranks, shard=settings.get("shard", False),
        )  # fmt: skip
        complete = distributed.unsplit(model, partial(type(model), model.config))
        queue = module.queue.image.sum().item()
        if ranks.rank == 0:
            torch.save({name: each.cpu() for name, each in complete.state_dict().items()}, out / "weights.pt")
            torch.save(dict(result.average), out / "average.pt") if ranks.world == 1 else None
            (out / "result.json").write_text(
                json.dumps(
                    {"exposures": result.exposures.tolist(), "queue": queue, "warnings": result.warnings}
                )
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
