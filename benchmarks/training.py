"""A pretraining step (ITC + ITM + LM, momentum towers, queue) beside the same one put together from transformers' modules.

The other side is what one writes today: transformers' vision tower, text encoder and decoder with shared layers, and the
released objective around them (ITM in a pass for matches and one for both kinds of negatives), AdamW by torch. Both begin
with the same weights, see the same batches and are timed in turn; without dropout, ITC and LM of the first step agree. Peak
memory is that of processes of their own, above what was there when their model was built; on a GPU, what torch allocated.

On processors `base` is bound by matrix products, so its target there is memory; `tiny` is where overhead rules. On a GPU:
python benchmarks/training.py --batch-size 96
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _device import matmul_rate, timed, twins
from _form import Record, main
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.models import build, preset
from capfilt.models.blip.model import Blip, BlipConfig, BlipPretraining, PretrainingConfig
from capfilt.models.common.precision import has_bf16
from capfilt.training import optim, throughput

VOCABULARY = {"tiny": 4096, "base": 30524}
"""What `capfilt pretrain` learns from a corpus unless told otherwise, and the published one."""
QUEUE = {"tiny": 4096, "base": 57600}
ALPHA = 0.4
TEXT_TOKENS = 30


def config_of(name: str) -> BlipConfig:
    """The preset without what transformers lacks (a convolutional stem) and without dropout, so that losses compare."""
    config = preset("blip", name, VOCABULARY[name])
    vision = dataclasses.replace(config.vision, stem="patch", drop_path=0.0)
    text = dataclasses.replace(config.text, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(config, vision=vision, text=text)


def batches(config: BlipConfig, rows: int, seed: int, device: torch.device) -> list[Batch]:
    """Two batches of random pictures with texts of 6 to 24 words: padded to their longest, as the loader does."""
    found = []
    for number in range(2):
        generator = torch.Generator().manual_seed(seed + number)
        lengths = torch.randint(8, 27, (rows,), generator=generator)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(1000, config.vocab_size - 2, mask.shape, generator=generator).masked_fill(
            ~mask, 0
        )
        ids[:, 0] = 101
        ids[torch.arange(rows), lengths - 1] = 102
        side = config.image_size
        pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
        numbers = torch.arange(rows) + rows * number
        batch = Batch(
            ids, mask, numbers, numbers, numbers, torch.ones(rows), torch.zeros(rows, dtype=torch.bool),
            [""] * rows, number, 0, pixels,
        )  # fmt: skip
        found.append(batch.to(device))
    return found


class Assembled(nn.Module):
    """BLIP's pretraining from transformers' modules, as its released code arranges them."""

    def __init__(self, model: Blip, queue: int) -> None:
        super().__init__()
        config = model.config
        self.config = config
        captioner, retrieval = twins(model, sep_id=102)
        self.vision = retrieval.vision_model
        self.text_encoder = retrieval.text_encoder
        self.text_decoder = captioner.text_decoder
        # Encoder and decoder share all but self-attention (BLIP, table 3).
        self.text_decoder.bert.embeddings = self.text_encoder.embeddings
        self.text_decoder.cls.predictions.decoder.weight = self.text_encoder.embeddings.word_embeddings.weight
        for ours, other in zip(
            self.text_encoder.encoder.layer, self.text_decoder.bert.encoder.layer, strict=True
        ):
            other.crossattention, other.intermediate, other.output = (
                ours.crossattention, ours.intermediate, ours.output,
            )  # fmt: skip
        self.vision_proj, self.text_proj = retrieval.vision_proj, retrieval.text_proj
        self.itm_head = retrieval.itm_head
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.followers = [
            (copy.deepcopy(live).requires_grad_(False), live)
            for live in (self.vision, self.text_encoder, self.vision_proj, self.text_proj)
        ]
        self.momentum = nn.ModuleList([average for average, _ in self.followers])
        self.register_buffer("mean", model.visual_encoder.mean.clone())
        self.register_buffer("std", model.visual_encoder.std.clone())
        for side in ("image", "text"):
            self.register_buffer(f"{side}_queue", F.normalize(torch.randn(config.embed_dim, queue), dim=0))
        self.pointer = 0

    @torch.no_grad()
    def after_step(self) -> None:
        self.temperature.clamp_(0.001, 0.5)
        for average, live in self.followers:
            for mine, theirs in zip(average.parameters(), live.parameters(), strict=True):
                mine.mul_(0.995).add_(theirs, alpha=0.005)

    def embed(
        self,
        vision: nn.Module,
        text: nn.Module,
        heads: tuple[nn.Module, nn.Module],
        batch: Batch,
        pixels: Tensor,
    ):
        tokens = vision(pixel_values=pixels).last_hidden_state
        image = F.normalize(heads[0](tokens[:, 0]), dim=-1)
        states = text(batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        return tokens, image, F.normalize(heads[1](states[:, 0]), dim=-1)

    def losses(self, batch: Batch, alpha: float) -> dict[str, Tensor]:
        assert batch.pixels is not None
        rows = len(batch)
        pixels = (batch.pixels.float() / 255 - self.mean) / self.std
        heads = (self.vision_proj, self.text_proj)
        tokens, image, text = self.embed(self.vision, self.text_encoder, heads, batch, pixels)
        with torch.no_grad():
            vision_m, text_encoder_m, *heads_m = self.momentum
            _, image_m, text_m = self.embed(vision_m, text_encoder_m, tuple(heads_m), batch, pixels)
            image_all = torch.cat([image_m.T, self.image_queue.clone()], dim=1)
            text_all = torch.cat([text_m.T, self.text_queue.clone()], dim=1)
            hard = torch.eye(rows, image_all.shape[1], device=image.device)
            to_text = alpha * F.softmax(image_m @ text_all / self.temperature, 1) + (1 - alpha) * hard
            to_image = alpha * F.softmax(text_m @ image_all / self.temperature, 1) + (1 - alpha) * hard
        itc = -(F.log_softmax(image @ text_all / self.temperature, 1) * to_text).sum(1).mean() / 2
        itc = itc - (F.log_softmax(text @ image_all / self.temperature, 1) * to_image).sum(1).mean() / 2
        with torch.no_grad():
            for name, found in (("image", image_m), ("text", text_m)):
                getattr(self, f"{name}_queue")[:, self.pointer : self.pointer + rows] = found.T
            self.pointer = (self.pointer + rows) % (self.image_queue.shape[1] - rows)
            near_text = F.softmax(image @ text.T / self.temperature, 1) + 1e-4
            near_image = F.softmax(text @ image.T / self.temperature, 1) + 1e-4
            near_text.fill_diagonal_(0)
            near_image.fill_diagonal_(0)
            negative_text = torch.multinomial(near_text, 1).squeeze(1)
            negative_image = torch.multinomial(near_image, 1).squeeze(1)
        ids = batch.ids.clone()
        ids[:, 0] = self.config.text.enc_id
        mask = batch.mask.long()
        matched = self.text_encoder(ids, attention_mask=mask, encoder_hidden_states=tokens).last_hidden_state
        unmatched = self.text_encoder(
            torch.cat([ids, ids[negative_text]]),
            attention_mask=torch.cat([mask, mask[negative_text]]),
            encoder_hidden_states=torch.cat([tokens[negative_image], tokens]),
        ).last_hidden_state
        logits = self.itm_head(torch.cat([matched[:, 0], unmatched[:, 0]]))
        labels = torch.cat([torch.ones(rows), torch.zeros(2 * rows)]).long().to(ids.device)
        itm = F.cross_entropy(logits.float(), labels)
        ids = batch.ids.clone()
        ids[:, 0] = self.config.text.dec_id
        lm = self.text_decoder(
            ids, attention_mask=mask, encoder_hidden_states=tokens, labels=ids.masked_fill(~batch.mask, -100)
        ).loss
        return {"loss": itc + itm + lm, "itc": itc, "itm": itm, "lm": lm}


def stepper(
    side: str, name: str, rows: int, seed: int, device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    """A function that takes one optimiser step and returns its losses."""
    config = config_of(name)
    model = build(config, seed=seed)
    given = batches(config, rows, seed, device)
    count = 0
    if side == "capfilt":
        # As the released pretraining: the pair alone is a match. The queue is full, as it soon is.
        pretraining = BlipPretraining(model, PretrainingConfig(queue_size=QUEUE[name], multi_positive=False))
        module: nn.Module = pretraining.to(device).train()
        fill(pretraining, seed)
        ours = optim.AdamW(optim.trainable(module))
    else:
        module = Assembled(model, QUEUE[name]).to(device).train()
        del model
        trained = [each for each in module.parameters() if each.requires_grad]
        theirs = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)
    half = has_bf16(device)

    def step() -> dict[str, Tensor]:
        nonlocal count
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            found: dict[str, Tensor] = module.losses(given[count % 2], ALPHA)  # type: ignore[operator]
        count += 1
        found["loss"].backward()  # type: ignore[no-untyped-call]
        if side == "capfilt":
            optim.clip_gradients(ours.parameters.values(), 1.0)
            ours.step(1e-4)
            ours.zero_grad()
        else:
            nn.utils.clip_grad_norm_(trained, 1.0)
            theirs.step()
            theirs.zero_grad()
        module.after_step()  # type: ignore[operator]
        return {key: value.detach() for key, value in found.items()}

    return step


def fill(module: BlipPretraining, seed: int) -> None:
    """Random unit vectors into the whole queue, under numbers that no batch has."""
    queue, generator = module.queue, torch.Generator().manual_seed(seed)
    shape, device = queue.image.shape, queue.image.device
    sides = [F.normalize(torch.randn(shape, generator=generator), dim=1).to(device) for _ in range(2)]
    numbers = -2 - torch.arange(len(queue.image), device=device)
    queue.enqueue(*sides, numbers, numbers)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(
    side: str, name: str, rows: int, seed: int, threads: int, out: multiprocessing.SimpleQueue[float]
) -> None:
    """Puts the GiB that two steps take at most, above what the imports took."""
    torch.set_num_threads(threads)
    import transformers.models.blip.modeling_blip  # noqa: F401

    before = resident()
    step = stepper(side, name, rows, seed, torch.device("cpu"))
    step()
    step()
    out.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**30)


def peak_gib(side: str, name: str, rows: int, seed: int, device: torch.device) -> float:
    """Peak memory of a side, measured apart from everything else."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = stepper(side, name, rows, seed, device)
        step()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=peak, args=(side, name, rows, seed, torch.get_num_threads(), queue))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the process that measured {side}'s memory ended with {child.exitcode}")
    return queue.get()


def compare(
    name: str, rows: int, pairs: int, args: argparse.Namespace, record: Record, device: torch.device
) -> float:
    """Times both sides in turn; records rates and agreement, returns the median ratio."""
    ours = stepper("capfilt", name, rows, args.seed, device)
    theirs = stepper("transformers", name, rows, args.seed, device)
    first, other = ours(), theirs()
    record.target(
        f"{name}_lm_difference",
        abs(first["lm"] - other["lm"]).item(),
        "<=",
        1e-3 if device.type == "cpu" else 0.1,
    )
    for step in (ours, theirs):
        step()
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[which].append(timed((ours, theirs)[which], device))
    rate = rows / statistics.median(seconds[0])
    record.figure(f"{name}_batch", rows)
    record.figure(f"{name}_images_per_second", rate)
    record.figure(f"{name}_transformers_images_per_second", rows / statistics.median(seconds[1]))
    model = BlipPretraining(build(config_of(name), args.seed), PretrainingConfig(queue_size=0)).to(device)
    batch = batches(config_of(name), rows, args.seed, device)[0]
    flops = throughput.flops_per_text(model, batch, lambda few: model.losses(few, ALPHA))
    record.figure(f"{name}_gflops_per_image", flops / 1e9)
    reached = throughput.peak_flops(device) or matmul_rate(device, torch.float32)
    record.figure(
        f"{name}_{'mfu' if device.type == 'cuda' else 'share_of_matmul_rate'}", rate * flops / reached
    )
    return statistics.median(b / a for a, b in zip(*seconds, strict=True))


def measure(args: argparse.Namespace, record: Record) -> None:
    """`base` and `tiny` on processors; `base` alone on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        rows = args.batch_size or 96
        ratio = compare("base", rows, 10, args, record, device)
        record.target("base_times_faster", ratio, ">=", 2.0)
        record.target("base_images_per_second", record.figures["base_images_per_second"], ">=", 900)
        for side in ("capfilt", "transformers"):
            record.figure(f"base_{side}_peak_gib", peak_gib(side, "base", rows, args.seed, device))
        return
    rows = args.batch_size or 64
    ratio = compare("tiny", rows, 3 if args.quick else 15, args, record, device)
    if args.quick:
        # Three pairs say little of speed: only that both sides do the same work is asked here.
        record.figure("tiny_times_faster", ratio)
        record.figure("tiny_peak_gib", peak_gib("capfilt", "tiny", rows, args.seed, device))
        return
    record.target("tiny_times_faster", ratio, ">=", 1.3)
    # A batch large enough that activations, and not weights alone, are the memory.
    rows = args.batch_size or 8
    mine, theirs = (peak_gib(side, "base", rows, args.seed, device) for side in ("capfilt", "transformers"))
    record.figure("base_peak_gib", mine)
    record.figure("base_transformers_peak_gib", theirs)
    record.target("base_share_of_memory", mine / theirs, "<=", 1.0)
    record.figure("base_times_faster", compare("base", rows, 2, args, record, device))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own option."""
    parser.add_argument(
        "--batch-size", type=int, default=0, help="texts per step (default: 64 tiny, 8 base, 96 on a GPU)"
    )


if __name__ == "__main__":
    main(__doc__, measure, arguments)
