"""Training runs for tests to start in several processes; see `launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.tokenizer import ADDED, Tokenizer
from capfilt.models import build
from capfilt.models.albef.model import AlbefConfig, AlbefObjective, AlbefPretraining
from capfilt.models.blip.model import BlipConfig, BlipPretraining, PretrainingConfig
from capfilt.models.clip.model import ClipConfig, ClipTextConfig, ClipTraining, ClipVisionConfig
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.masking import IGNORED
from capfilt.models.common.ranks import Ranks
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.vilt import model as matching
from capfilt.models.vilt.model import ViltConfig, ViltTextConfig, ViltVisionConfig
from capfilt.tables.shards import Part
from capfilt.training import distributed, loop, throughput
from capfilt.training.loop import TrainConfig, train
from tests.training.grids import pairs, written
from tests.training.spoilt import spoil


def launch(world: int, out: Path, cases: dict[str, dict]) -> subprocess.CompletedProcess[str]:
    """Trains every case into `out` / its name, in `world` processes through torchrun, or in one without it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    written(out / "grids", pairs(40))
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    return subprocess.run(
        [*command, "tests.training.together", str(out)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


VISION = VisionConfig(16, 8, width=32, depth=2, heads=2, hidden=64)


def blip(corpus, ranks, dropout, objective):
    tokenizer = Tokenizer.train(corpus.texts(), 100, min_frequency=1)
    text = TextConfig(
        tokenizer.vocab_size, 32, 2, 2, 64, max_positions=30, dropout=dropout, attention_dropout=0.0
    )
    model = build(BlipConfig(vision=VISION, text=text, embed_dim=16), seed=1)
    return BlipPretraining(model, PretrainingConfig(**{"queue_size": 24, **objective}), ranks), tokenizer


def clip(corpus, ranks, dropout, objective, vision=None):
    tokenizer = BpeTokenizer.train(corpus.texts(), 600)
    text = ClipTextConfig(tokenizer.vocab_size, 30, 32, 2, 2, 64)
    model = build(
        ClipConfig(vision or ClipVisionConfig(16, 8, 32, 2, 2, 64), text, embed_dim=16, max_text_tokens=30),
        seed=1,
    )
    return ClipTraining(model, None, ranks), tokenizer


def resnet(*given):
    return clip(*given, vision=ClipVisionConfig(32, width=8, heads=4, stages="1-1-1-1"))


def second(ids, mask):
    """A `Masking` that draws nothing: of every text its second token is hidden."""
    said = torch.full_like(ids, IGNORED)
    said[:, 1] = ids[:, 1]
    hidden = ids.clone()
    hidden[:, 1] = 4
    return hidden, said


def neighbours(image_index, text_index):
    """A `mismatched` that draws nothing: every second text is seen with the picture before its own, on the same rank."""
    rows = torch.arange(len(image_index))
    label = 1 - rows % 2
    return rows - rows % 2, label, (label == 1) | (image_index != image_index[rows - rows % 2])


def vilt(corpus, ranks, dropout, objective):
    matching.mismatched = neighbours
    tokenizer = Tokenizer.train(corpus.texts(), 100, min_frequency=1)
    text = ViltTextConfig(tokenizer.vocab_size, 30)
    model = build(ViltConfig(ViltVisionConfig(16, 8), text, 32, 2, 2, 64, dropout=dropout), seed=1)
    return matching.ViltTraining(model, second, None, ranks), tokenizer


def albef(corpus, ranks, dropout, objective):
    tokenizer = Tokenizer.train(corpus.texts(), 100, min_frequency=1)
    text = TextConfig(
        tokenizer.vocab_size - len(ADDED),
        32,
        2,
        2,
        64,
        max_positions=30,
        dropout=dropout,
        attention_dropout=0.0,
    )
    model = build(AlbefConfig(vision=VISION, text=text, embed_dim=16), seed=1)
    return AlbefPretraining(
        model, second, AlbefObjective(**{"queue_size": 24, **objective}), ranks
    ), tokenizer


MODELS = {"blip": blip, "clip": clip, "resnet": resnet, "vilt": vilt, "albef": albef}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with distributed.joined() as ranks:
        for name, case in json.loads((out / "cases.json").read_text()).items():
            run(out / name, ranks, **case)


def run(
    out: Path, ranks: Ranks, config=None, objective=None, dropout=0.0, recompute=False, shard=False,
    uneven=False, peak=None, signal_at=0, number="SIGTERM", of_rank=0, kind="blip", spoilt=(),
    weighted=False, dropped=(),
) -> None:  # fmt: skip
    """One training run; a signal is sent to one rank, once. The examples `dropped` have no text, and those that are odd a soft
    target. The last rank's gradients at the steps `spoilt` are not finite."""
    out.mkdir(parents=True, exist_ok=True)
    loop.EXPOSED = 7  # fewer than there are: counts travel in pieces
    grids = PairInput(Part(out.parent / "grids"))
    corpus = Pairs([grids], size=32 if kind == "resnet" else 16)
    settings = TrainConfig(
        **{"steps": 4, "learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1, **(config or {})}
    )
    module, tokenizer = MODELS[kind](corpus, ranks, dropout, objective or {})
    model = module.model
    if ranks.rank == ranks.world - 1:
        spoil(module, spoilt)
    recompute_activations(model, recompute)
    if peak:
        throughput.peak_flops = lambda device: peak

    def batches(start):
        for batch in corpus.batches(
            tokenizer, 12, seed=3, steps=settings.steps, start_step=start,
            rank=ranks.rank, world=ranks.world, parts=settings.accumulate,
        ):  # fmt: skip
            if weighted:
                batch.weight = batch.example % 4 / 3
            if dropped:
                batch.dropped = torch.isin(batch.example, torch.tensor(dropped))
                batch.weight = (~batch.dropped).float()
                batch.soft = batch.dropped * (batch.example % 2) * 0.3
                batch.near_ids, batch.near_mask = (
                    each[:, None].repeat(1, 5, 1) for each in (batch.ids.roll(1, 1), batch.mask)
                )
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
        if hasattr(module, "queue"):
            tensors["queue"] = module.queue.image
        tensors["exposures"] = torch.from_numpy(result.exposures)
        torch.save(tensors, out / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
