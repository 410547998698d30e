"""Which stages there are: capfilt's own, and those that installed packages add.

Light: nothing of a stage is imported before it runs, and nothing of another package before its stage is asked for.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from capfilt.errors import UserError
from capfilt.stages import options as stage_options
from capfilt.stages.command import StageCommand

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "capfilt.stages"
"""The group of entry points by which a package adds stages; each names a StageCommand."""

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
        ("capfilt.stages.text_assignment:FinetuneTextAssignment",),
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
        instead=("closed", "capfilt.stages.classifier_training:FinetuneClosedVqa"),
    ),
    StageCommand(
        ("finetune", "nlvr"),
        stage_options.FinetuneNlvrOptions,
        ("capfilt.stages.task_training:FinetuneNlvr",),
        (
            "capfilt finetune nlvr --init pretrained --examples nlvr2 --images nlvr2",
            "capfilt finetune nlvr --single --init pretrained --examples nlvr --images nlvr",
        ),
        instead=("single", "capfilt.stages.classifier_training:FinetuneSingleNlvr"),
    ),
    StageCommand(
        ("finetune", "entailment"),
        stage_options.FinetuneEntailmentOptions,
        ("capfilt.stages.classifier_training:FinetuneEntailment",),
        ("capfilt finetune entailment --init pretrained --examples snli-ve --images flickr30k",),
    ),
    StageCommand(
        ("finetune", "classification"),
        stage_options.FinetuneClassificationOptions,
        ("capfilt.stages.classifier_training:FinetuneClassification",),
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
            "capfilt select --images cc12m --signals duplicates --require 'first AND width >= 200' --out unique",
        ),
        without="pairs",
    ),
    StageCommand(
        ("retrain",),
        stage_options.RetrainOptions,
        ("capfilt.stages.train:Retrain",),
        (
            "capfilt retrain --human coco --pairs capfilt --preset base",
            "capfilt retrain --human coco --verdicts cc12m=top30 --out retrained-top30",
            "capfilt retrain --model clip --human coco --pairs capfilt --preset base --out clip",
            "capfilt retrain --model vilt --human coco --pairs capfilt --preset base --out vilt",
            "capfilt retrain --model albef --human coco --pairs capfilt --preset base --out albef",
        ),
        kinds=(
            "model",
            {
                "clip": "capfilt.stages.retrain_clip:RetrainClip",
                "vilt": "capfilt.stages.retrain_vilt:RetrainVilt",
                "albef": "capfilt.stages.retrain_albef:RetrainAlbef",
            },
        ),
    ),
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


def installed() -> dict[str, list[EntryPoint]]:
    """The entry points of the stages that other packages add, by name; capfilt's own names are not theirs to take."""
    # Not at the top: a command of capfilt's own needs no look at what is installed.
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name not in {command.name for command in STAGES}:
            found.setdefault(entry.name, []).append(entry)
    return found


def stage_command(name: str) -> StageCommand:
    """The stage called `name`, its words joined by `-`.

    Raises UserError naming the stages there are, and for a package's stage that cannot be had.
    """
    for command in STAGES:
        if command.name == name:
            return command
    others = installed()
    if name not in others:
        names = [*(command.name for command in STAGES), *others]
        raise UserError(f"no stage is called {name!r}; the stages are {', '.join(names)}")
    values = {entry.value: entry for entry in others[name]}
    if len(values) > 1:
        raise UserError(f"stage {name!r}: declared twice, as {' and '.join(values)}; uninstall one package")
    ((value, entry),) = values.items()
    where = f"stage {name!r} ({value} of the package {entry.dist.name if entry.dist else '?'})"
    try:
        command = entry.load()
    except Exception as error:
        raise UserError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(command, StageCommand) or command.words != (name,):
        raise UserError(f"{where}: is no StageCommand of that one word")
    plain = [field.name for field in fields(command.options) if "help" not in field.metadata]
    if plain:
        raise UserError(f"{where}: its option {plain[0]!r} is not made by `capfilt.stages.options.option`")
    return command
