"""`examples`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import REQUIRED, ROWS, SPLITS, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class ExamplesOptions(Checked):
    """Bring questions, statements or labels into an examples part.

    SOURCE_PATH is a file of VQA v2, NLVR, NLVR2, SNLI-VE, DAQUAR or easy-VQA, a folder of class folders, or records
    (JSON Lines or a JSON list): image or images; question, sentence, hypothesis or caption; answers, ratings,
    negative_caption or label; split.
    """

    panel = ROWS

    source_path: str = option(
        REQUIRED, "file of questions or records, or folder of class folders", kind="path"
    )
    dataset: str = option(REQUIRED, "name of the examples part to write")
    images: tuple[str, ...] = option(
        (), "images part with the pictures, found by key; repeatable", kind="images"
    )
    annotations: str = option("", "VQA v2's answers, where they are public", kind="path")
    task: str = option(
        "auto",
        "task of the examples; auto: by their fields",
        choices=("auto", "vqa", "nlvr", "entailment", "classification", "match", "rating", "choice"),
    )
    answer_parts: bool = option(
        False, "a record's answers are parts of one set (DAQUAR), not several people's", later=True, rare=True
    )
    splits: tuple[str, ...] = option((), "keep only this split; repeatable; default: all", choices=SPLITS)
    split: str = option("", "split of every row, where the source names none", choices=("", *SPLITS))
    limit: int = option(0, "keep only the first N examples; 0: all")
    shard_size: int = option(10_000, "rows per shard, the unit of resume", least=1, rare=True)


COMMAND = StageCommand(
    ("examples",),
    ExamplesOptions,
    ("capfilt.stages.examples.stage:Examples",),
    (
        "capfilt examples questions.json --annotations annotations.json --images coco --dataset vqav2",
        "capfilt examples nlvr2/train.json --images nlvr2 --dataset nlvr2 --split train",
        "capfilt examples imagenet --images imagenet --dataset imagenet",
    ),
    positional="source_path",
    out=True,
)
