"""What the stages that train share: checks of options, the corpus, the loop's settings, and what lands in a checkpoint.

Not here: what each starts from and which losses it takes (`train.py`), the loop itself (`capfilt.training`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from capfilt.data import transforms
from capfilt.data.corpus import Batch, Corpus, concat, from_images
from capfilt.data.store import cpu_workers
from capfilt.data.stream import PairStream, StreamInput
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models import checkpoint
from capfilt.models.blip import Blip
from capfilt.models.pretraining import BlipPretraining, PretrainingConfig
from capfilt.models.ranks import Ranks
from capfilt.stages.base import ModelStage, Report, option_values
from capfilt.stages.options import OptimisationOptions
from capfilt.stages.pairs import Held, Pairs, Streamed, shares
from capfilt.tables.publish import publish_new
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.training import distributed, state
from capfilt.training.average import swapped
from capfilt.training.log import check_tensorboard
from capfilt.training.loop import TrainConfig, train
from capfilt.training.optim import DECAY_RULES
from capfilt.training.schedule import SCHEDULES

IMAGE_COLUMNS = ("image_id", "source", "captions", "split", "status", "failure", "image")
LOG_EVERY = 20


class Training(ModelStage):
    """What the four share: inputs, output, the loop."""

    version = 1

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.ranks = options.ranks
        self.output = output.path if output else workspace.model(options.out)
        self.human = [workspace.part("images", name).expect("images").check() for name in options.human]
        web = getattr(options, "web", ())
        self.web = [workspace.part("images", name).expect("images").check() for name in web]
        if options.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"--precision {options.precision!r}: choose auto, fp32 or bf16")
        if options.steps < 0 or (not options.steps and options.epochs <= 0):
            raise UserError("--steps, or --epochs, must be above 0")
        if options.batch_size < 2:
            raise UserError(f"--batch-size {options.batch_size}: contrast and hard negatives need at least 2")
        shares(options.mix)
        if options.stream and options.cache_features:
            raise UserError("--stream and --cache-features: features are cached for pictures that are held")
        if options.loader_workers < 0 or (options.loader_workers and not options.stream):
            raise UserError(f"--loader-workers {options.loader_workers}: 0 or more, and with --stream")
        if options.accumulate < 1 or options.batch_size // options.accumulate < 2:
            raise UserError(
                f"--accumulate {options.accumulate}: {options.batch_size} texts do not make so many micro-batches of at "
                "least 2"
            )
        if options.ranks < 0 or (options.shard and options.ranks == 1):
            raise UserError(f"--ranks {options.ranks}: 0 or more, and with --shard more than 1")
        if options.shard and options.cache_features:
            raise UserError("--shard and --cache-features: features are cached by models that are whole")
        for name, allowed in (("schedule", SCHEDULES), ("decay", DECAY_RULES)):
            if getattr(options, name) not in allowed:
                raise UserError(f"--{name} {getattr(options, name)!r}: choose {', '.join(allowed)}")
        if options.randaugment < 0 or not 0 <= options.randaugment_level <= 10:
            raise UserError(
                f"--randaugment {options.randaugment}, level {options.randaugment_level:g}: give 0 or more operations, "
                "and a level from 0 to 10"
            )
        if options.randaugment and (options.cache_features or not options.augment):
            raise UserError("--randaugment changes pictures: it needs --augment, and no --cache-features")
        if options.tensorboard:
            check_tensorboard()
        if options.keep_states < 1:
            raise UserError(f"--keep-states {options.keep_states}: give 1 or more")
        if not 0 <= options.ema < 1:
            raise UserError(f"--ema {options.ema:g}: give a decay in [0, 1), 0 for no average")

    # What each stage says for itself.

    @abstractmethod
    def initial(self, pairs: Pairs) -> tuple[Blip, Tokenizer]:
        """The model to train, and its tokenizer."""

    @abstractmethod
    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        """Which losses."""

    @abstractmethod
    def image_size(self) -> int:
        """Side of the pictures the model sees, in pixels."""

    @property
    def prompt(self) -> str:
        """What stands before every text."""
        return ""

    def inputs(self) -> list[Part]:
        """Every part the training reads."""
        return [*self.human, *self.web]

    def corpora(self, size: int) -> list[Corpus]:
        """The pairs, a corpus per kind of input."""
        return [
            from_images((t for part in parts for t in part.tables(IMAGE_COLUMNS)), size=size)
            for parts in (self.human, self.web)
            if parts
        ]

    def streamed(self) -> list[StreamInput]:
        """The same pairs, as a stream takes them."""
        return [StreamInput(part) for part in (*self.human, *self.web)]

    # The same for all.

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=("save_every",)),
            "inputs": {str(index): part.digest() for index, part in enumerate(self.inputs())},
        }

    def done(self) -> bool:
        if not (self.output / checkpoint.CONFIG).is_file():
            return False
        made = checkpoint.read_config(self.output).get("extra", {})
        if made.get("fingerprint") != self.fingerprint():
            raise UserError(
                f"{self.output}: holds a checkpoint made with other options or inputs"
                f"{_changed(made.get('identity', {}), dict(self.identity()))}; name another --out, or remove it"
            )
        return True

    def outlook(self) -> str:
        o: OptimisationOptions = self.options
        length = f"{o.steps:,} steps" if o.steps else f"{o.epochs:g} epochs"
        rows = sum(part.rows for part in self.inputs())
        return f"{length} of {o.batch_size} texts over {rows:,} images"

    def run(self, report: Report) -> Mapping[str, Any]:
        with distributed.joined() as ranks:
            return self._run(ranks, report)

    def _run(self, ranks: Ranks, report: Report) -> Mapping[str, Any]:
        o = self.options
        if o.batch_size % (ranks.world * o.accumulate) and ranks.world > 1:
            raise UserError(
                f"--batch-size {o.batch_size}: {ranks.world} ranks with {o.accumulate} micro-batches each do not divide it"
            )
        pairs = self._pairs(self.image_size())
        model, tokenizer = self.initial(pairs)
        where = distributed.device()
        model.to(where)
        if o.freeze_vision:
            model.visual_encoder.requires_grad_(False)
        model.recompute_activations(o.recompute)
        if o.cache_features:
            if not (model.config.vision.trunk and model.config.vision.trunk_frozen):
                raise UserError(
                    "--cache-features: only a frozen trunk has features to cache (--preset trunk)"
                )
            assert isinstance(pairs, Held)
            pairs.corpus = pairs.corpus.with_features(
                lambda pixels: model.visual_encoder.trunk_features(pixels.to(where)),
                progress=lambda count: None,
            )
        steps = o.steps or math.ceil(o.epochs * len(pairs) / o.batch_size)
        epoch = len(pairs) / o.batch_size
        ramp = getattr(o, "alpha_ramp_epochs", 0.0)
        by_step = o.schedule == "cosine"
        config = TrainConfig(
            steps=steps,
            batch_size=o.batch_size,
            accumulate=o.accumulate,
            learning_rate=o.learning_rate,
            min_lr=o.min_lr,
            warmup_steps=min(o.warmup_steps, steps // 2) if by_step else o.warmup_steps,
            schedule=o.schedule,
            decay_rate=o.decay_rate,
            epoch_texts=0 if by_step else len(pairs),
            weight_decay=o.weight_decay,
            decay=o.decay,
            clip_norm=o.clip_norm,
            ema=o.ema,
            seed=o.seed,
            alpha=getattr(o, "alpha", 0.0),
            alpha_ramp_steps=math.ceil(ramp * epoch),
            hardness_ramp_steps=getattr(o, "hardness_ramp_steps", 0),
            precision=o.precision,
            augment=None if not o.augment or o.cache_features or o.randaugment else self._augment,
            log_every=LOG_EVERY,
            save_every=o.save_every,
            keep_states=o.keep_states,
            stuck_steps=o.stuck_steps,
            collapse_steps=o.collapse_steps,
        )
        self.output.mkdir(parents=True, exist_ok=True)
        state_path = self.output / "state.safetensors"
        module = BlipPretraining(model, self.objective(tokenizer), ranks).to(where)
        result = train(
            module,
            lambda start: pairs.batches(
                tokenizer,
                o.batch_size,
                seed=o.seed,
                steps=steps,
                start_step=start,
                max_text_tokens=o.max_text_tokens,
                prompt=self.prompt,
                transform=partial(self._vary, ranks.rank) if o.randaugment else None,
                mixing=shares(o.mix),
                rank=ranks.rank,
                world=ranks.world,
                parts=o.accumulate,
            ),
            config,
            on_step=lambda step, values: report(step, steps, _shown(values)),
            on_best=partial(self._keep, "best", model, tokenizer, ranks) if o.keep_best else None,
            log_path=self.output / "log.jsonl",
            tensorboard_path=self.output / "tensorboard" if o.tensorboard else None,
            state_path=state_path if o.save_every else None,
            fingerprint=self._state_fingerprint(ranks),
            examples=len(pairs),
            ranks=ranks,
            shard=o.shard,
        )
        figures = {
            "steps": result.steps,
            "texts": len(pairs),
            "images": pairs.pictures,
            "by_source": pairs.texts_by_source(),
            "left_out": {**pairs.skipped, **pairs.deselected},
            "skipped_steps": result.skipped_steps,
            "seconds": round(result.seconds, 1),
            **_shown(result.losses),
        }
        if ranks.rank == 0:
            _write_exposures(self.output / "exposures.parquet", pairs, result.exposures.tolist())
        extra = {
            "stage": self.name,
            "fingerprint": self.fingerprint(),
            "identity": dict(self.identity()),
            "figures": figures,
            "warnings": list(result.warnings),
        }
        if result.average:
            self._keep("live", model, tokenizer, ranks, result.steps, result.losses.get("loss"))
        # What everything downstream loads under the checkpoint's name is the average, where there is one.
        with swapped(module, result.average):
            _save(self.output, model, tokenizer, ranks, extra)
        if ranks.rank == 0:
            state.remove(state_path)
        return {name: figures[name] for name in ("steps", "texts", "images", *_shown(result.losses))}

    def _pairs(self, size: int) -> Pairs:
        if self.options.stream:
            return Streamed(PairStream(self.streamed()), size, self.options.loader_workers)
        corpus = concat(self.corpora(size))
        if not len(corpus):
            raise UserError(
                f"{self.name}: no training pairs in {', '.join(str(part.path) for part in self.inputs())} "
                f"(left out: {dict(corpus.skipped) | dict(corpus.deselected)})"
            )
        return Held(corpus)

    def _state_fingerprint(self, ranks: Ranks) -> str:
        """What a saved state must share: where ranks have shards of their own, how many they are too."""
        own = self.options.stream and ranks.world > 1
        return f"{self.fingerprint()} in {ranks.world} ranks" if own else self.fingerprint()

    def _keep(
        self, name: str, model: Blip, tokenizer: Tokenizer, ranks: Ranks, step: int, loss: float | None
    ) -> None:
        extra = {"stage": self.name, "of": self.output.name, "step": step, "loss": loss}
        _save(self.output / name, model, tokenizer, ranks, extra)

    def _augmentation(self) -> transforms.Augmentation:
        return transforms.Augmentation(
            scale=(self.options.crop_scale, 1.0), flip=0.5 if self.options.flip else 0.0
        )

    # A flip makes "on the left" false: pictures whose text names a side keep theirs.

    def _augment(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        assert batch.pixels is not None
        return transforms.augment(batch.pixels, generator, self._augmentation(), keep_sides=batch.sided)[0]

    def _vary(self, rank: int, pixels: torch.Tensor, sided: torch.Tensor, step: int) -> torch.Tensor:
        o = self.options
        return transforms.training_views(
            pixels,
            (o.seed, step, rank) if rank else (o.seed, step),
            self._augmentation(),
            operations=o.randaugment,
            level=o.randaugment_level,
            keep_sides=sided,
            workers=cpu_workers(),
        )


def _save(directory: Path, model: Blip, tokenizer: Tokenizer, ranks: Ranks, extra: dict[str, Any]) -> None:
    """The checkpoint, by rank 0; all call it, since the weights may be split over them."""
    complete = distributed.unsplit(model, lambda: Blip(model.config))
    if ranks.rank == 0:
        checkpoint.save(directory, complete, tokenizer, extra)


def _shown(values: Mapping[str, Any]) -> dict[str, float]:
    wanted = ("itc", "itm", "lm", "itm_balanced_accuracy", "images_per_second")
    return {name: float(values[name]) for name in wanted if name in values}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = old.get("options", {}), new.get("options", {})
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if names:
        return f" ({names[0]} was {before.get(names[0])!r}, is now {after.get(names[0])!r})"
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return f" ({names[0]} changed)" if names else ""


def _write_exposures(path: Path, pairs: Pairs, counts: list[int]) -> None:
    text_ids, image_ids, sources = zip(*pairs.identities(), strict=True)
    table = pa.table({"text_id": text_ids, "image_id": image_ids, "source": sources, "exposures": counts})
    path.unlink(missing_ok=True)
    publish_new(path, lambda attempt: pq.write_table(table, attempt, compression="zstd"))
