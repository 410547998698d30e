"""The stages that train a BLIP: `pretrain`, `finetune captioner`, `finetune filter`, `retrain`.

They differ in what they start from, which pairs they see and which losses they take; the loop is `training/`'s.
A checkpoint directory holds `config.json` (written last), `model.safetensors`, `tokenizer.json`, `log.jsonl` (learning
curves) and `exposures.parquet` (how often each text was trained on); where options ask for them, `live/` (the weights
that were not averaged) and `best/` (those of the lowest training loss) are checkpoints of their own.
"""

from __future__ import annotations

import dataclasses
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
from capfilt.data.corpus import Batch, Corpus, concat, from_images, from_pairs, from_verdicts
from capfilt.data.stream import PairStream, StreamInput
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models import checkpoint
from capfilt.models.blip import Blip, build
from capfilt.models.objectives import BlipPretraining, PretrainingConfig, scaled_momentum
from capfilt.models.presets import preset
from capfilt.models.pretrained import load_vit
from capfilt.stages.base import ModelStage, Report, option_values
from capfilt.stages.options import (
    FinetuneCaptionerOptions,
    FinetuneFilterOptions,
    OptimisationOptions,
    PretrainOptions,
    RetrainOptions,
)
from capfilt.stages.pairs import Held, Pairs, Streamed, shares
from capfilt.tables.ids import file_sha256
from capfilt.tables.publish import publish_new
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.training import state
from capfilt.training.average import swapped
from capfilt.training.log import check_tensorboard
from capfilt.training.loop import TrainConfig, train

IMAGE_COLUMNS = ("image_id", "source", "captions", "split", "status", "failure", "image")
VERDICT_COLUMNS = ("text_id", "image_id", "source", "text", "keep")
LOG_EVERY = 20


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Training(ModelStage):
    """What the four share: inputs, output, the loop."""

    version = 1

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
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
            "options": option_values(self.options, without=("save_every", "loader_workers")),
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
        o = self.options
        pairs = self._pairs(self.image_size())
        model, tokenizer = self.initial(pairs)
        where = device()
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
        config = TrainConfig(
            steps=steps,
            batch_size=o.batch_size,
            accumulate=o.accumulate,
            learning_rate=o.learning_rate,
            min_lr=o.min_lr,
            warmup_steps=min(o.warmup_steps, steps // 2),
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
            ema=o.ema,
            seed=o.seed,
            alpha=getattr(o, "alpha", 0.0),
            alpha_ramp_steps=math.ceil(ramp * epoch),
            hardness_ramp_steps=getattr(o, "hardness_ramp_steps", 0),
            precision=o.precision,
            augment=None if not o.augment or o.cache_features else self._augment,
            log_every=LOG_EVERY,
            save_every=o.save_every,
            keep_states=o.keep_states,
            stuck_steps=o.stuck_steps,
            collapse_steps=o.collapse_steps,
        )
        self.output.mkdir(parents=True, exist_ok=True)
        state_path = self.output / "state.safetensors"
        module = BlipPretraining(model, self.objective(tokenizer)).to(where)
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
                mixing=shares(o.mix),
            ),
            config,
            on_step=lambda step, values: report(step, steps, _shown(values)),
            on_best=partial(self._keep, "best", model, tokenizer) if o.keep_best else None,
            log_path=self.output / "log.jsonl",
            tensorboard_path=self.output / "tensorboard" if o.tensorboard else None,
            state_path=state_path if o.save_every else None,
            fingerprint=self.fingerprint(),
            examples=len(pairs),
        )
        module.to("cpu")
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
        _write_exposures(self.output / "exposures.parquet", pairs, result.exposures.tolist())
        extra = {
            "stage": self.name,
            "fingerprint": self.fingerprint(),
            "identity": dict(self.identity()),
            "figures": figures,
            "warnings": list(result.warnings),
        }
        if result.average:
            self._keep("live", model, tokenizer, result.steps, result.losses.get("loss"))
        # What everything downstream loads under the checkpoint's name is the average, where there is one.
        with swapped(module, result.average):
            checkpoint.save(self.output, model, tokenizer, extra)
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

    def _keep(self, name: str, model: Blip, tokenizer: Tokenizer, step: int, loss: float | None) -> None:
        extra = {"stage": self.name, "of": self.output.name, "step": step, "loss": loss}
        checkpoint.save(self.output / name, model, tokenizer, extra)

    def _augment(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        assert batch.pixels is not None
        choice = transforms.Augmentation(
            scale=(self.options.crop_scale, 1.0), flip=0.5 if self.options.flip else 0.0
        )
        # A flip makes "on the left" false: pictures whose text names a side keep theirs.
        return transforms.augment(batch.pixels, generator, choice, keep_sides=batch.sided)[0]


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


class Pretrain(_Training):
    """Step 1: noisy web pairs and human pairs; ITC, ITM and LM (BLIP, section 3.2)."""

    name = "pretrain"
    options: PretrainOptions

    def __init__(self, options: PretrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        if not self.inputs():
            raise UserError(f"{self.name}: give at least one part to train on (--human, --web)")
        for kind in ("vocab", "vision_init"):
            path = getattr(options, kind)
            if path and path != "corpus" and not Path(path).exists():
                raise UserError(f"--{kind.replace('_', '-')} {path}: no such file or directory")
        preset(options.preset, 1000)

    def identity(self) -> Mapping[str, Any]:
        vocab = self.options.vocab
        digest = file_sha256(_tokenizer_file(vocab)) if vocab != "corpus" else "corpus"
        vision = (
            file_sha256(Path(self.options.vision_init) / "model.safetensors")
            if self.options.vision_init
            else ""
        )
        return {**super().identity(), "vocab": digest, "vision_init": vision}

    def image_size(self) -> int:
        return self.options.image_size or preset(self.options.preset, 1000).image_size

    def initial(self, pairs: Pairs) -> tuple[Blip, Tokenizer]:
        o = self.options
        if o.vocab == "corpus":
            tokenizer = Tokenizer.train(pairs.texts(), o.vocab_size)
        elif o.vocab.endswith(".txt"):
            tokenizer = Tokenizer.from_vocab(o.vocab)
        else:
            tokenizer = Tokenizer.load(o.vocab)
        config = preset(o.preset, tokenizer.vocab_size)
        vision = dataclasses.replace(config.vision, image_size=self.image_size())
        text = dataclasses.replace(config.text, pad_id=tokenizer.pad_id)
        model = build(dataclasses.replace(config, vision=vision, text=text, prompt=""), seed=o.seed)
        if o.vision_init:
            load_vit(model.visual_encoder, o.vision_init)
        return model, tokenizer

    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        o = self.options
        return PretrainingConfig(
            queue_size=o.queue_size, momentum=_momentum(o), label_smoothing=o.label_smoothing
        )


def _momentum(options: PretrainOptions | FinetuneFilterOptions) -> float | None:
    if options.momentum_batch_size and options.momentum:
        return scaled_momentum(options.momentum, options.batch_size, options.momentum_batch_size)
    return options.momentum or None


def _tokenizer_file(vocab: str) -> Path:
    path = Path(vocab)
    return path / "tokenizer.json" if path.is_dir() else path


class Retrain(Pretrain):
    """Step 3: a new model on human, kept web and kept synthetic pairs (BLIP, section 3.3)."""

    name = "retrain"
    options: RetrainOptions

    def __init__(self, options: RetrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.model != "blip":
            raise UserError(f"--model {options.model!r}: choose blip")
        self.pairs = [workspace.part("pairs", name).expect("pairs").check() for name in options.pairs]
        self.joined: list[tuple[Part, Part]] = []
        for item in options.verdicts:
            images, equals, verdicts = item.partition("=")
            if not equals:
                raise UserError(f"--verdicts {item}: write IMAGES=VERDICTS, the names of two parts")
            self.joined.append(
                (
                    workspace.part("images", images).expect("images").check(),
                    workspace.part("verdicts", verdicts).expect("verdicts").check(),
                )
            )
        self.start = workspace.model(options.continue_from) if options.continue_from else None
        super().__init__(options, workspace, output)

    def inputs(self) -> list[Part]:
        return [*super().inputs(), *self.pairs, *(part for joined in self.joined for part in joined)]

    def identity(self) -> Mapping[str, Any]:
        start = checkpoint.fingerprint(self.start) if self.start else ""
        return {**super().identity(), "continue_from": start}

    def image_size(self) -> int:
        if self.start and not self.options.image_size:
            return _image_size_of(self.start)
        return super().image_size()

    def corpora(self, size: int) -> list[Corpus]:
        corpora = super().corpora(size)
        if self.pairs:
            corpora.append(from_pairs((t for part in self.pairs for t in part.tables()), size=size))
        for images, verdicts in self.joined:
            corpora.append(
                from_verdicts(images.tables(IMAGE_COLUMNS), verdicts.tables(VERDICT_COLUMNS), size=size)
            )
        return corpora

    def streamed(self) -> list[StreamInput]:
        joined = [StreamInput(images, verdicts) for images, verdicts in self.joined]
        return [*super().streamed(), *(StreamInput(part) for part in self.pairs), *joined]

    def initial(self, pairs: Pairs) -> tuple[Blip, Tokenizer]:
        return _loaded(self.start, self.image_size()) if self.start else super().initial(pairs)


def _image_size_of(directory: Path) -> int:
    return int(checkpoint.read_config(directory)["config"]["vision"]["image_size"])


def _loaded(directory: Path, image_size: int) -> tuple[Blip, Tokenizer]:
    model, tokenizer, _ = checkpoint.load(directory)
    if image_size != model.config.image_size:
        model.resize_image(image_size)
    return model, tokenizer


class _Finetune(_Training):
    """Starts from a pretrained checkpoint and sees human pairs only."""

    options: FinetuneCaptionerOptions | FinetuneFilterOptions

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        if not self.human:
            raise UserError(f"{self.name}: give at least one part with human captions (--human)")
        self.init = workspace.model(options.init)
        checkpoint.read_config(self.init)

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "init": checkpoint.fingerprint(self.init)}

    def image_size(self) -> int:
        return _image_size_of(self.init)

    def initial(self, pairs: Pairs) -> tuple[Blip, Tokenizer]:
        return _loaded(self.init, self.image_size())


class FinetuneCaptioner(_Finetune):
    """Step 2: LM on clean pairs, after a prompt that is given and not learned (BLIP, section 3.3 and its released code)."""

    name = "finetune-captioner"
    options: FinetuneCaptionerOptions

    @property
    def prompt(self) -> str:
        return self.options.prompt

    def initial(self, pairs: Pairs) -> tuple[Blip, Tokenizer]:
        model, tokenizer = super().initial(pairs)
        model.config = dataclasses.replace(model.config, prompt=self.options.prompt)
        return model, tokenizer

    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        return PretrainingConfig(
            objectives=("lm",),
            queue_size=0,
            momentum=None,
            label_smoothing=self.options.label_smoothing,
            prompt_length=tokenizer.prompt_length(self.options.prompt),
        )


class FinetuneFilter(_Finetune):
    """Step 2: ITC and ITM on clean pairs (BLIP, section 3.3)."""

    name = "finetune-filter"
    options: FinetuneFilterOptions

    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        return PretrainingConfig(
            objectives=("itc", "itm"),
            queue_size=self.options.queue_size,
            momentum=_momentum(self.options),
        )
