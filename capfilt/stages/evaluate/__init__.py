"""`evaluate`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import INPUTS, MACHINE, REQUIRED, ROWS, SPLITS, TASKS, TEXTS, Checked, option
from capfilt.stages.command import StageCommand
from capfilt.tasks import registry


@dataclass(frozen=True)
class EvaluateOptions(Checked):
    """Evaluate a checkpoint, task by task, on one split. See docs/evaluation.md."""

    panel = TASKS

    model: str = option("retrained", "checkpoint", kind="model")
    images: str = option(REQUIRED, "images part, with captions or with the examples' pictures", kind="images")
    examples: tuple[str, ...] = option(
        (), "examples part for the other tasks; each task takes its own rows; repeatable", kind="examples"
    )
    pictures: tuple[str, ...] = option(
        (), "further images part with pictures of the examples; repeatable", kind="images"
    )
    out: str = option("", "name of the result in runs/; default: the model's")
    markdown: str = option(
        "", "also write the figures to this file, as a Markdown table", told=True, panel=INPUTS
    )
    split: str = option("test", "split to evaluate on; empty: every row", choices=("", *SPLITS), panel=ROWS)
    support_split: str = option(
        "",
        "split to learn from (few-shot) or to set thresholds on (match)",
        choices=("", *SPLITS),
        panel=ROWS,
    )
    limit: int = option(0, "evaluate N images or examples only; 0: all", panel=ROWS)
    tasks: tuple[str, ...] = option(
        (),
        "task to evaluate; repeatable; default: all that model, images and examples allow",
        choices=tuple(task.name for task in registry.TASKS),
    )
    rerank: int = option(128, "retrieval: candidates to re-rank by ITM (BLIP: 128, COCO: 256); 0: none")
    answer_list: str = option(
        "", "vqa: rank these answers, a JSON list or lines; default: write", kind="path", panel=TASKS
    )
    answer_k: int = option(
        128, "vqa: compare N answers whole when ranking (BLIP's code: 128)", least=1, rare=True
    )
    templates: str = option(
        "cifar",
        "zero-shot: single, cifar or imagenet (CLIP's prompts), or a file with one {} per line",
        kind="path",
        panel=TASKS,
    )
    shots: str = option("1,2,4,8,16", "few-shot: examples per class, with commas", rare=True)
    draws: int = option(3, "few-shot: draws of the examples", least=1, rare=True)
    seed: int = option(0, "seed of the bootstrap intervals and of few-shot draws", rare=True)
    resamples: int = option(2000, "resamples of the bootstrap intervals, by image; 0: no intervals")
    method: str = option(
        "beam", "captioning: how to decode", choices=("nucleus", "beam", "greedy"), panel=TEXTS
    )
    num_beams: int = option(3, "captioning, vqa: beams (BLIP: 3)", least=1, panel=TEXTS)
    beam_rule: str = option(
        "transformers",
        "beam: released counts the prompt, not [SEP], and stops as BLIP's code does",
        later=True,
        choices=("transformers", "released"),
        panel=TEXTS,
        rare=True,
    )
    prompt: str = option("", "captioning: prompt; pretrained models learned none", panel=TEXTS)
    max_new_tokens: int = option(20, "captioning: longest text in tokens", least=1, panel=TEXTS)
    caption_scorer: str = option(
        "capfilt",
        "captioning: who computes the metrics; pycocoevalcap: METEOR and SPICE too, needs Java",
        choices=("capfilt", "pycocoevalcap"),
        panel=TEXTS,
        rare=True,
    )
    batch_size: int = option(64, "images per batch", least=1, panel=MACHINE)
    precision: str = option(
        "auto",
        "arithmetic; auto: bf16 on GPUs that have it, else fp32",
        later=True,
        choices=("auto", "fp32", "bf16"),
        panel=MACHINE,
    )


COMMAND = StageCommand(
    ("evaluate",),
    EvaluateOptions,
    ("capfilt.stages.evaluate.stage:Evaluate",),
    (
        "capfilt evaluate --model retrained --images coco --split test",
        "capfilt evaluate --model filter --images coco --tasks retrieval --rerank 256",
        "capfilt evaluate --model filter --images cifar10 --examples cifar10 --tasks zero-shot --tasks few-shot",
        "capfilt evaluate --images coco --tasks captioning --caption-scorer pycocoevalcap --markdown table.md",
    ),
    shows="capfilt.results:shown_after",
)
