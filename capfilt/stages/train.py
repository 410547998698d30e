"""The stages that train on pairs: `pretrain`, `retrain FAMILY`, `finetune captioner`, `finetune filter`, `finetune
text-assignment`.

Each says which rows, which start and which losses; the losses are the family's (`capfilt.models`). Not here: the training
(`training.py`), the stages that train on a task's examples (`task_training.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from capfilt.errors import UserError
from capfilt.inference.adapters import Opened, adapted
from capfilt.models import Model, checkpoint, family_named, family_of
from capfilt.models.albef.tasks import ASSIGNED, TextAssignment, nlvr_from_albef
from capfilt.models.common.ranks import Ranks
from capfilt.models.family import CAPTIONING, RETRIEVAL, found
from capfilt.stages.calibrate.compare import HeldOut
from capfilt.stages.calibrate.held_out import trained_on
from capfilt.stages.sources import PairSource, rows_source
from capfilt.stages.starts import Checkpoint, Foreign, Preset, Start
from capfilt.stages.training import Train
from capfilt.stages.training_options import (
    FinetuneCaptionerOptions,
    FinetuneFilterOptions,
    FinetuneTextAssignmentOptions,
    refuse_foreign,
)
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

SHOWN = ("itc", "itm", "lm", "itm_balanced_accuracy")


class Pretrain(Train):
    """Step 1: a new BLIP, from noisy web pairs and human pairs (BLIP, section 3.2)."""

    name = "pretrain"
    version = 3  # one order and one crop, held or streamed, on any number of ranks
    least = 2  # contrast and hard negatives

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        self.family = family_named(options.family)
        self.shown = self.family.shown
        super().__init__(options, workspace, output)
        self.family.check()
        self.objective = self.family.part("objective")

        def start() -> Start:
            if getattr(options, "init", ""):
                return Foreign(self.family, workspace, options, self.name)
            return Preset(self.family, options)

        self.compose(start, lambda: rows_source(self.family.kinds[0].rows, options, workspace))

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "family": self.family.name, "family_version": self.family.version}


class Retrain(Pretrain):
    """Step 3: a model of any family, on human, kept web and kept synthetic pairs (BLIP, section 3.3)."""

    name = "retrain"


class FinetuneCaptioner(Train):
    """Step 2: language modelling on clean pairs, after a prompt that is given and not learned (BLIP, section 3.3, code)."""

    name = "finetune-captioner"
    least = 2
    shown = SHOWN
    options: FinetuneCaptionerOptions

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        self.compose(
            lambda: Checkpoint(workspace, options, lambda kind: CAPTIONING in kind.learns, self.name),
            lambda: PairSource(options, workspace, options.prompt),
        )
        self.objective = found(self.start.kind.learns[CAPTIONING])

    def initial(self, data: Any) -> tuple[Model, Any]:
        model, tokenizer = super().initial(data)
        model.config = dataclasses.replace(model.config, prompt=self.options.prompt)
        return model, tokenizer


class FinetuneFilter(Train):
    """Step 2: a family's finetuning for retrieval on clean pairs: ITC and ITM (BLIP, section 3.3; ALBEF, section 5), or a
    picture's own text above fifteen others (ViLT, section 4.4).
    """

    name = "finetune-filter"
    version = 4  # negatives by the model's own similarities, without a floor; one order, held or streamed
    least = 2
    shown = (*SHOWN, "accuracy")
    options: FinetuneFilterOptions

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)

        def start() -> Start:
            made = Checkpoint(workspace, options, lambda kind: RETRIEVAL in kind.learns, self.name)
            refuse_foreign(options, family_of(made.kind.model))
            return made

        self.compose(start, lambda: PairSource(options, workspace))
        self.objective = found(self.start.kind.learns[RETRIEVAL])
        if options.against and not options.held_out:
            raise UserError(f"--against {options.against[0]}: is compared on --held-out; give both")

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The pictures on which judges are compared."""
        o = self.options
        return HeldOut(o.held_out, o.against, self.workspace, o.seed) if o.held_out else None

    def identity(self) -> Mapping[str, Any]:
        if not self.held_out:
            return super().identity()
        against = [checkpoint.fingerprint(path) for path in self.held_out.against.values()]
        return {**super().identity(), "held_out": self.held_out.part.digest(), "against": against}

    def initial(self, data: Any) -> tuple[Model, Any]:
        if self.held_out:
            # Before the training: none of the pictures may be one of its own, or of its ancestors.
            self.held_out.refuse({image for image, _ in data.identities()}, "this filter")
            before = trained_on(self.workspace.model(self.options.init), self.workspace)
            self.held_out.refuse(before or set(), self.options.init)
        return super().initial(data)

    def judged(self, model: Any, tokenizer: Any, where: torch.device) -> dict[str, float]:
        if not self.held_out:
            return {}
        own = Opened("", model.config.image_size, adapted(model.to(where).eval(), tokenizer))
        return self.held_out.areas(own)

    def remarks(self) -> list[str]:
        lines = super().remarks()
        if self.options.held_out:
            figures = checkpoint.read_config(self.output)["extra"].get("figures", {})
            found = {
                name: area for name, area in figures.items() if name.endswith(("itc_score", "itm_score"))
            }
            order = sorted(found, key=lambda name: -found[name])
            told = ", ".join(f"{name} {found[name]:.3f}" for name in order)
            lines.append(
                f"ROC-AUC on {self.options.held_out}: {told} (chance 0.5); trust {order[0]}, or fuse them by capfilt calibrate"
            )
        return lines


class FinetuneTextAssignment(Train):
    """A text and two pictures: it belongs to the first, to the second, or to neither; a third each (ALBEF, section 5).

    The checkpoint is a start of `finetune nlvr`.
    """

    name = "finetune-text-assignment"
    least = 3  # a text's own picture and two others
    shown = ("loss", "accuracy")
    options: FinetuneTextAssignmentOptions

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        self.compose(
            lambda: Checkpoint(workspace, options, lambda kind: kind.name == "albef", self.name),
            lambda: PairSource(options, workspace),
        )

    def planned(self) -> None:
        # A step on the way to `finetune nlvr`, whose model is the one to export.
        return None

    def initial(self, data: Any) -> tuple[Model, Any]:
        model, tokenizer = super().initial(data)
        self.projection = model.vision_proj
        return nlvr_from_albef(model, self.options.seed, self.options.drop_path, ASSIGNED), tokenizer

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        return TextAssignment(model, self.projection)
