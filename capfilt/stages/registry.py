"""Which stages there are: the words that call each, its options, its classes by name, its examples.

Light: nothing of a stage is imported before it runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capfilt.errors import UserError
from capfilt.models import FAMILIES, families
from capfilt.models.family import Family
from capfilt.stages import options as stage_options

if TYPE_CHECKING:
    from capfilt.stages.base import ModelStage, ShardStage
    from capfilt.tables.shards import Part
    from capfilt.tables.workspace import Workspace


@dataclass(frozen=True)
class StageCommand:
    """How one stage is called: its words, the classes it runs in order, its examples."""

    words: tuple[str, ...]
    options: type
    stages: tuple[str, ...]
    examples: tuple[str, ...]
    positional: str = ""
    out: bool = False  # whether --out names a directory (the option dataclass has none of its own)
    without: str = ""  # a boolean option that, when off, leaves out all stages but the first
    instead: tuple[str, str] = ("", "")  # an option that, when set, runs this class in place of the others
    shows: str = (
        ""  # "module:function" that the command line calls with (output, options, quiet, where) at the end
    )

    @property
    def name(self) -> str:
        """The words joined by `-`, as recipes write them."""
        return "-".join(self.words)

    def classes(self, options: Any) -> tuple[str, ...]:
        """The classes to run with these options, in order."""
        option, path = self.instead
        if option and getattr(options, option):
            return (path,)
        return self.stages[:1] if self.without and not getattr(options, self.without) else self.stages

    def build(
        self, path: str, options: Any, workspace: Workspace, output: Part | None = None
    ) -> ShardStage | ModelStage:
        """An instance of the class at "module:Class". Raises UserError for an option that must be given and was not."""
        missing = stage_options.missing(options)
        if missing:
            raise UserError(
                f"{self.name}: {missing[0]} must be given (see capfilt {' '.join(self.words)} --help)"
            )
        # Before the inputs are looked at: they may not be there yet when a recipe's steps are checked.
        if hasattr(options, "dataset"):
            workspace.dataset("images", options.dataset)
        if getattr(options, "out", ""):
            workspace.model(options.out)
        module, _, name = path.partition(":")
        place = workspace.noting()
        stage: ShardStage | ModelStage = getattr(importlib.import_module(module), name)(
            options, place, output
        )
        stage.gaps = place.gaps
        return stage


def retrain(family: Family) -> StageCommand:
    """`retrain FAMILY`."""
    name = family.name
    return StageCommand(
        ("retrain", name),
        stage_options.retrain_options(family),
        ("capfilt.stages.train:Retrain",),
        (
            f"capfilt retrain {name} --human coco --pairs capfilt --preset base --out {name}",
            f"capfilt retrain {name} --human coco --verdicts cc12m=top30 --out {name}-top30",
        ),
    )


STAGES = (
    StageCommand(
        ("download",),
        stage_options.DownloadOptions,
        ("capfilt.stages.download:Download",),
        (
            "capfilt download urls.parquet --dataset cc12m --image-size 384",
            "capfilt download urls.tsv --url-col URL --caption-col TEXT --out images/laion",
            "capfilt download s3://bucket/laion/ --preset laion --robots --host-rate 2 --retries 2",
            "capfilt download --dataset cc12m --retry failed --failure timeout --failure dns --timeout 30",
        ),
        positional="url_list",
        out=True,
        instead=("retry", "capfilt.stages.download:Retry"),
    ),
    StageCommand(
        ("ingest",),
        stage_options.IngestOptions,
        ("capfilt.stages.ingest:Ingest",),
        (
            "capfilt ingest captions_train2017.json --images train2017 --dataset coco",
            "capfilt ingest img2dataset_output --dataset cc3m --source web",
        ),
        positional="source_path",
        out=True,
    ),
    StageCommand(
        ("examples",),
        stage_options.ExamplesOptions,
        ("capfilt.stages.examples:Examples",),
        (
            "capfilt examples questions.json --annotations annotations.json --images coco --dataset vqav2",
            "capfilt examples nlvr2/train.json --images nlvr2 --dataset nlvr2 --split train",
            "capfilt examples imagenet --images imagenet --dataset imagenet",
        ),
        positional="source_path",
        out=True,
    ),
    StageCommand(
        ("duplicates",),
        stage_options.DuplicatesOptions,
        ("capfilt.stages.duplicates:Duplicates",),
        (
            "capfilt duplicates --images cc12m",
            "capfilt duplicates --images cc12m --distance 0 --out exact",
        ),
    ),
    StageCommand(
        ("subset",),
        stage_options.SubsetOptions,
        ("capfilt.stages.subset:Subset",),
        (
            "capfilt subset flickr --dataset human --share-to 0.15 --splits train",
            "capfilt subset flickr --dataset web --share-from 0.15 --wrong 0.5 --role web",
        ),
        positional="images",
        out=True,
    ),
    StageCommand(
        ("pretrain",),
        stage_options.PretrainOptions,
        ("capfilt.stages.train:Pretrain",),
        ("capfilt pretrain --human coco --web cc12m --preset base --epochs 20",),
    ),
    StageCommand(
        ("finetune", "captioner"),
        stage_options.FinetuneCaptionerOptions,
        ("capfilt.stages.train:FinetuneCaptioner",),
        ("capfilt finetune captioner --init pretrained --human coco",),
    ),
    StageCommand(
        ("finetune", "filter"),
        stage_options.FinetuneFilterOptions,
        ("capfilt.stages.train:FinetuneFilter",),
        ("capfilt finetune filter --init pretrained --human coco",),
    ),
    StageCommand(
        ("finetune", "text-assignment"),
        stage_options.FinetuneTextAssignmentOptions,
        ("capfilt.stages.train:FinetuneTextAssignment",),
        ("capfilt finetune text-assignment --init albef --human coco --web cc3m",),
    ),
    StageCommand(
        ("finetune", "vqa"),
        stage_options.FinetuneVqaOptions,
        ("capfilt.stages.task_training:FinetuneVqa",),
        (
            "capfilt finetune vqa --init pretrained --examples vqav2 --images coco",
            "capfilt finetune vqa --closed --examples vqav2 --images coco --out vqa-closed",
            "capfilt finetune vqa --examples vqav2 --examples vg --answer-weight vg=0.2 --images coco --images vg",
        ),
        instead=("closed", "capfilt.stages.task_training:FinetuneClosedVqa"),
    ),
    StageCommand(
        ("finetune", "nlvr"),
        stage_options.FinetuneNlvrOptions,
        ("capfilt.stages.task_training:FinetuneNlvr",),
        (
            "capfilt finetune nlvr --init pretrained --examples nlvr2 --images nlvr2",
            "capfilt finetune nlvr --single --init pretrained --examples nlvr --images nlvr",
        ),
        instead=("single", "capfilt.stages.task_training:FinetuneSingleNlvr"),
    ),
    StageCommand(
        ("finetune", "entailment"),
        stage_options.FinetuneEntailmentOptions,
        ("capfilt.stages.task_training:FinetuneEntailment",),
        ("capfilt finetune entailment --init pretrained --examples snli-ve --images flickr30k",),
    ),
    StageCommand(
        ("finetune", "classification"),
        stage_options.FinetuneClassificationOptions,
        ("capfilt.stages.task_training:FinetuneClassification",),
        ("capfilt finetune classification --init pretrained --examples cifar10 --images cifar10",),
    ),
    StageCommand(
        ("caption",),
        stage_options.CaptionOptions,
        ("capfilt.stages.caption:CaptionStage",),
        (
            "capfilt caption --images cc12m --captioner captioner",
            "capfilt caption --images cc12m --method beam --num-beams 3 --out captioner-beam",
            "capfilt caption --images cc12m --captioner my-vlm:./checkpoint --captioner-option style=short",
            "capfilt caption --images cc12m --captioner captioner --filter filter",
        ),
        instead=("filter", "capfilt.stages.caption_and_score:CaptionAndScore"),
    ),
    StageCommand(
        ("score",),
        stage_options.ScoreOptions,
        ("capfilt.stages.score:ScoreStage",),
        (
            "capfilt score --images cc12m --captions captioner --filter filter",
            "capfilt score --images cc12m --captions captioner --filter clip:./clip-vit-base-patch32",
        ),
    ),
    StageCommand(
        ("select",),
        stage_options.SelectOptions,
        ("capfilt.stages.select:Select", "capfilt.stages.select:WritePairs"),
        (
            "capfilt select --images cc12m --captions captioner --scores filter --threshold 0.5",
            "capfilt select --images cc12m --captions captioner --keep-fraction 0.3 --out top30 --no-pairs",
            "capfilt select --images cc12m --scores clip --by clip_score --threshold 0.28 --out clip28",
        ),
        without="pairs",
    ),
    *map(retrain, FAMILIES),
    StageCommand(
        ("evaluate",),
        stage_options.EvaluateOptions,
        ("capfilt.stages.evaluate:Evaluate",),
        (
            "capfilt evaluate --model retrained --images coco --split test",
            "capfilt evaluate --model filter --images coco --tasks retrieval --rerank 256",
            "capfilt evaluate --model filter --images cifar10 --examples cifar10 --tasks zero-shot --tasks few-shot",
            "capfilt evaluate --images coco --tasks captioning --caption-scorer pycocoevalcap --markdown table.md",
        ),
        shows="capfilt.results:shown_after",
    ),
    StageCommand(
        ("grade",),
        stage_options.GradeOptions,
        ("capfilt.stages.grade:Grade",),
        ("capfilt grade --images web --verdicts capfilt --expert itm_expert/data.jsonl --filter filter",),
    ),
)


def stages() -> tuple[StageCommand, ...]:
    """All stages, those of model families of other packages last."""
    return (*STAGES, *map(retrain, families()[len(FAMILIES) :]))


def stage_command(name: str) -> StageCommand:
    """The stage called `name`, its words joined by `-`. Raises UserError naming the stages there are."""
    for command in stages():
        if command.name == name:
            return command
    raise UserError(
        f"no stage is called {name!r}; the stages are {', '.join(command.name for command in stages())}"
    )
