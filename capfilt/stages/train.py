"""The stages that train a BLIP: `pretrain`, `finetune captioner`, `finetune filter`, `retrain`.

They differ in what they start from, which pairs they see and which losses they take; what they share is `pair_training.py`'s.
A checkpoint directory holds `config.json` (written last), `model.safetensors`, `tokenizer.json`, `log.jsonl` (learning
curves) and `exposures.parquet` (how often each text was trained on); where options ask for them, `live/` (the weights
that were not averaged) and `best/` (those of the lowest training loss) are checkpoints of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models import checkpoint, kinds
from capfilt.models.albef import Albef
from capfilt.models.albef_pretraining import AlbefObjective, AlbefPretraining
from capfilt.models.blip import Blip, build
from capfilt.models.kinds import Model
from capfilt.models.matching import RankingTraining
from capfilt.models.objectives import scaled_momentum
from capfilt.models.presets import preset
from capfilt.models.pretrained import load_bert, load_vit
from capfilt.models.pretraining import PretrainingConfig
from capfilt.models.ranks import Ranks
from capfilt.models.vilt import Vilt
from capfilt.stages.options import (
    RETRAINED,
    FinetuneCaptionerOptions,
    FinetuneFilterOptions,
    FinetuneTextAssignmentOptions,
    PretrainOptions,
    RetrainOptions,
)
from capfilt.stages.pair_training import PairTraining
from capfilt.tables.ids import file_sha256
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class Pretrain(PairTraining):
    """Step 1: noisy web pairs and human pairs; ITC, ITM and LM (BLIP, section 3.2)."""

    name = "pretrain"
    model: ClassVar[str] = "blip"
    options: PretrainOptions

    def __init__(self, options: PretrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        if not any(getattr(options, name, ()) for name in ("human", "web", "pairs", "verdicts")):
            raise UserError(f"{self.name}: give at least one part to train on (--human, --web)")
        for kind in ("vocab", "vision_init", "text_init"):
            path = getattr(options, kind)
            if path and path != "corpus" and not Path(path).exists():
                raise UserError(f"--{kind.replace('_', '-')} {path}: no such file or directory")
        self.shape(1000)
        super().__init__(options, workspace, output)

    def shape(self, vocab_size: int) -> Any:
        """The preset of the model to train. UserError where there is none of the name."""
        return preset(self.options.preset, vocab_size)

    def identity(self) -> Mapping[str, Any]:
        vocab = self.options.vocab
        digest = file_sha256(_tokenizer_file(vocab)) if vocab != "corpus" else "corpus"
        vision = (
            file_sha256(Path(self.options.vision_init) / "model.safetensors")
            if self.options.vision_init
            else ""
        )
        found = {**super().identity(), "vocab": digest, "vision_init": vision}
        if self.options.text_init:
            found["text_init"] = file_sha256(Path(self.options.text_init) / "model.safetensors")
        return found

    def image_size(self) -> int:
        return int(self.options.image_size or self.shape(1000).image_size)

    def built(self, config: Any) -> Any:
        """A new model of this shape."""
        return build(dataclasses.replace(config, prompt=""), seed=self.options.seed)

    def initial(self, pairs: Pairs) -> tuple[Model, Any]:
        tokenizer = self.vocabulary(pairs)
        model = self.built(self.sized(tokenizer))
        self.load_towers(model)
        return model, tokenizer

    def load_towers(self, model: Any) -> None:
        """Fills a new model with the pretrained parts that were asked for."""
        o = self.options
        if o.vision_init:
            load_vit(model.visual_encoder, o.vision_init)
        if o.text_init:
            load_bert(model, o.text_init)

    def planned(self) -> Any:
        # A vocabulary that is learned later is none that was published, whatever its size.
        learned = self.options.vocab == "corpus"
        return self.sized(SimpleNamespace(vocab_size=1000, pad_id=0) if learned else self.vocabulary(None))

    def vocabulary(self, pairs: Any) -> Any:
        """The tokenizer of a new model; `pairs` are needed where it is learned from them."""
        o = self.options
        cleaning = kinds.named(self.model).cleaning
        if o.vocab == "corpus":
            return Tokenizer.train(pairs.texts(), o.vocab_size, cleaning=cleaning)
        given = Tokenizer.from_vocab(o.vocab) if o.vocab.endswith(".txt") else Tokenizer.load(o.vocab)
        return given.cleaned_as(cleaning)

    def sized(self, tokenizer: Any) -> Any:
        """The preset for this tokenizer, with pictures and patches of the sizes that were asked for."""
        config = self.shape(tokenizer.vocab_size)
        patch = self.options.patch_size or config.vision.patch_size
        vision = dataclasses.replace(config.vision, image_size=self.image_size(), patch_size=patch)
        if self.options.stem:
            vision = dataclasses.replace(vision, stem=self.options.stem)
        text = dataclasses.replace(config.text, pad_id=tokenizer.pad_id)
        return dataclasses.replace(config, vision=vision, text=text)

    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        return PretrainingConfig(label_smoothing=self.options.label_smoothing, **alignment(self.options))


def alignment(options: PretrainOptions | FinetuneFilterOptions) -> dict[str, Any]:
    """What the options say of an `AlignmentConfig`."""
    momentum: float | None = options.momentum or None
    if options.momentum_batch_size and momentum:
        momentum = scaled_momentum(momentum, options.batch_size, options.momentum_batch_size)
    return {
        "queue_size": options.queue_size,
        "momentum": momentum,
        "multi_positive": options.multi_positive,
        "global_negatives": options.global_negatives,
    }


def _tokenizer_file(vocab: str) -> Path:
    path = Path(vocab)
    return path / "tokenizer.json" if path.is_dir() else path


class Retrain(Pretrain):
    """Step 3: a new model on human, kept web and kept synthetic pairs (BLIP, section 3.3)."""

    name = "retrain"
    options: RetrainOptions

    def __init__(self, options: RetrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.model not in RETRAINED:
            raise UserError(f"--model {options.model!r}: choose {', '.join(RETRAINED)}")
        self.options = options
        self.check_options(self.model)
        super().__init__(options, workspace, output)
        self.pairs = [workspace.input("pairs", name).check() for name in options.pairs]
        self.joined: list[tuple[Part, Part]] = []
        for item in options.verdicts:
            images, equals, verdicts = item.partition("=")
            if not equals:
                raise UserError(f"--verdicts {item}: write IMAGES=VERDICTS, the names of two parts")
            self.joined.append(
                (
                    workspace.input("images", images).check(),
                    workspace.input("verdicts", verdicts).check(),
                )
            )
        self.start = workspace.model(options.continue_from) if options.continue_from else None
        if self.start:
            self.check_start(self.start, "--continue-from", [kinds.named(self.model).model])

    def inputs(self) -> list[Part]:
        return [*super().inputs(), *self.pairs, *(part for joined in self.joined for part in joined)]

    def identity(self) -> Mapping[str, Any]:
        start = checkpoint.fingerprint(self.start) if self.start else ""
        return {**super().identity(), "continue_from": start}

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.start, self.options.continue_from) if self.start else {}

    def image_size(self) -> int:
        if self.start and not self.options.image_size:
            return _image_size_of(self.start)
        return super().image_size()

    def pair_inputs(self) -> list[PairInput]:
        joined = [PairInput(images, verdicts) for images, verdicts in self.joined]
        return [*super().pair_inputs(), *(PairInput(part) for part in self.pairs), *joined]

    def planned(self) -> Any:
        return checkpoint.shape_of(self.start) if self.start else super().planned()

    def initial(self, pairs: Pairs) -> tuple[Model, Any]:
        if not self.start:
            return super().initial(pairs)
        contents, _ = checkpoint.open_any(self.start, self.image_size())
        return contents.model, contents.tokenizer


def _image_size_of(directory: Path) -> int:
    return int(checkpoint.read_config(directory)["config"]["vision"]["image_size"])


class Finetune(PairTraining):
    """Starts from a pretrained checkpoint."""

    starts: ClassVar[tuple[type[Model], ...]] = (Blip,)
    options: FinetuneCaptionerOptions | FinetuneFilterOptions | FinetuneTextAssignmentOptions

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        if not options.human:
            raise UserError(f"{self.name}: give at least one part with human captions (--human)")
        super().__init__(options, workspace, output)
        self.init = workspace.model(options.init)
        self.kind = self.check_start(self.init, "--init", self.starts)

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "init": checkpoint.fingerprint(self.init)}

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.init, self.options.init)

    def image_size(self) -> int:
        return self.options.image_size or _image_size_of(self.init)

    def planned(self) -> Any:
        return checkpoint.shape_of(self.init)

    def initial(self, pairs: Pairs) -> tuple[Model, Any]:
        contents, _ = checkpoint.open_any(self.init, self.image_size())
        return contents.model, contents.tokenizer


class FinetuneCaptioner(Finetune):
    """Step 2: LM on clean pairs, after a prompt that is given and not learned (BLIP, section 3.3 and its released code)."""

    name = "finetune-captioner"
    options: FinetuneCaptionerOptions

    @property
    def prompt(self) -> str:
        return self.options.prompt

    def initial(self, pairs: Pairs) -> tuple[Model, Any]:
        model, tokenizer = super().initial(pairs)
        assert isinstance(model, Blip)
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


class FinetuneFilter(Finetune):
    """Step 2: ITC and ITM on clean pairs (BLIP, section 3.3). Of an ALBEF or a ViLT, its finetuning for retrieval (ALBEF,
    section 5; ViLT, section 4.4: its own text above fifteen others).
    """

    name = "finetune-filter"
    version = 4  # negatives by the model's own similarities, without a floor; one order, held or streamed
    starts = (Blip, Albef, Vilt)
    shown = (*PairTraining.shown, "accuracy")
    options: FinetuneFilterOptions

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        # A filter writes nothing: there is no language model whose targets to smooth.
        self.check_options(self.kind, without=("label_smoothing",))

    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        # BLIP's retrieval code draws by what the model itself finds alike; its pretraining, by the momentum towers too.
        return PretrainingConfig(
            objectives=("itc", "itm"), own_negatives=True, negative_floor=0.0, **alignment(self.options)
        )

    def module(self, model: Any, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        if isinstance(model, Albef):
            config = AlbefObjective(objectives=("itc", "itm"), **alignment(self.options))
            return AlbefPretraining(model, config=config, ranks=ranks)
        if isinstance(model, Vilt):
            return RankingTraining(model, ranks=ranks)
        return super().module(model, tokenizer, ranks)
