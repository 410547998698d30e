"""Tiny models of every family, batches for them made by hand, and their objectives: what the golden numbers are of.

Every import of a model or an objective that these tests need stands here, so that only this file follows a module that moves.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.data.bpe import END as ENDS
from capfilt.data.bpe import START as STARTS
from capfilt.data.bpe import BpeTokenizer
from capfilt.data.loader import Batch
from capfilt.data.task_corpus import TaskBatch
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.models import build, kind_of, kinds
from capfilt.models.albef.model import AlbefConfig, AlbefObjective, AlbefPretraining
from capfilt.models.albef.tasks import (
    ASSIGNED,
    TextAssignment,
    classifier_from_albef,
    nlvr_from_albef,
    vqa_from_albef,
)
from capfilt.models.blip.model import BlipConfig, BlipPretraining, PretrainingConfig
from capfilt.models.blip.tasks import classifier_from_blip, nlvr_from_blip, vqa_from_blip
from capfilt.models.clip.model import (
    ClipConfig,
    ClipTextConfig,
    ClipTraining,
    ClipVisionConfig,
    ContrastConfig,
)
from capfilt.models.common.masking import Masking
from capfilt.models.common.task_objectives import AnsweringConfig, ClassifierTraining, VqaTraining
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.locked.model import PRESETS as LOCKED_PRESETS
from capfilt.models.locked.model import LockedTextConfig, LockedTraining, LockedVisionConfig
from capfilt.models.locked.over import OverConfig
from capfilt.models.vilt.model import (
    MatchingConfig,
    ViltConfig,
    ViltTextConfig,
    ViltTraining,
    ViltVisionConfig,
)
from capfilt.models.vilt.tasks import RankingTraining, classifier_from_vilt, pair_from_vilt

WORDS = ("a", "red", "blue", "green", "white", "square", "circle", "on", "left", "right", "two")
PIECES = ("##s", "##e", "##d", "##n", "##t", "##r")
TOKENS = (*SPECIALS, *WORDS, *PIECES, *ADDED)
VOCAB, SIZE, LENGTH = len(TOKENS), 16, 7
PAD, CLS, SEP, MASK = 0, 2, 3, 4
START, END = VOCAB - 2, VOCAB - 1  # CLIP's
TRUTH = ("false", "true")
ENTAILMENT = ("contradiction", "neutral", "entailment")
ANSWERS = ("no", "yes", "red", "two")

# No dropout: its draws differ between builds of torch, all others are of its own generator and do not.
VISION = VisionConfig(SIZE, 8, width=12, depth=1, heads=2, hidden=16)
TEXT = TextConfig(VOCAB, 8, 2, 2, 16, max_positions=12, dropout=0.0, attention_dropout=0.0)
BLIP = BlipConfig(VISION, TEXT, embed_dim=6)
ALBEF = AlbefConfig(VISION, dataclasses.replace(TEXT, vocab_size=VOCAB - len(ADDED)), embed_dim=6)
VILT = ViltConfig(ViltVisionConfig(SIZE, 8), ViltTextConfig(VOCAB, 12), 8, 2, 2, 16, dropout=0.0)
CLIP = ClipConfig(ClipVisionConfig(SIZE, 8, 8, 1, 2, 16), ClipTextConfig(VOCAB, 12, 8, 1, 2, 16), embed_dim=6)
LOCKED = dataclasses.replace(
    LOCKED_PRESETS["tiny"],
    vision=LockedVisionConfig(SIZE, "pixels"),
    text=LockedTextConfig(VOCAB, 8, 1, 2, 16, 12, encoder=""),
    hidden=8,
    embed_dim=6,
)
RESNET = dataclasses.replace(CLIP, vision=ClipVisionConfig(32, width=2, heads=2, stages="1-1-1-1"))
CONV = dataclasses.replace(BLIP, vision=dataclasses.replace(VISION, width=32, stem="conv"))


# ---------------------------------------------------------------------- models


def filled(model: nn.Module, seed: int = 0) -> Any:
    """The model with a value of ordinary size in every number, the same on every machine, whatever order they are made in.

    Single numbers (temperatures, scales) stay as they are.
    """
    running = [(name, each) for name, each in model.named_buffers() if "running_" in name]
    with torch.no_grad():
        for name, each in [*model.named_parameters(), *running]:
            if each.dim():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                values = torch.randint(-32, 33, each.shape, generator=generator) / 64
                scale = each.dim() == 1 and name.endswith(("weight", "running_var"))
                each.copy_(1.0 + values / 2 if scale else values)
    return model


def _blip(**changes: Any) -> Any:
    return filled(build(dataclasses.replace(BLIP, **changes)))


def _albef(**changes: Any) -> Any:
    return filled(build(dataclasses.replace(ALBEF, **changes)))


def _vilt(**changes: Any) -> Any:
    return filled(build(dataclasses.replace(VILT, **changes)))


def _clip(config: ClipConfig) -> Any:
    return build(config, 3)


MODELS: Mapping[str, Callable[[], Any]] = {
    "blip": lambda: build(BLIP, seed=3),
    "blip_conv": lambda: build(CONV, 3),
    "blip_captioner": lambda: build(dataclasses.replace(BLIP, half="captioner"), 3),
    "blip_filter": lambda: build(dataclasses.replace(BLIP, half="filter"), 3),
    "blip_vqa": lambda: vqa_from_blip(_blip(), 3, drop_path=0.0),
    "blip_nlvr": lambda: nlvr_from_blip(_blip(), 3, drop_path=0.0),
    "blip_classifier": lambda: classifier_from_blip(_blip(), "entailment", ENTAILMENT, 3, drop_path=0.0),
    "blip_closed": lambda: classifier_from_blip(_blip(), "vqa", ANSWERS, 3, drop_path=0.0),
    "blip_single": lambda: classifier_from_blip(_blip(), "nlvr", TRUTH, 3, drop_path=0.0),
    "blip_pictures": lambda: classifier_from_blip(_blip(), "classification", ANSWERS, 3, drop_path=0.0),
    "clip": lambda: _clip(CLIP),
    "clip_sigmoid": lambda: _clip(dataclasses.replace(CLIP, logit_bias=True, activation="gelu")),
    "clip_resnet": lambda: _clip(RESNET),
    "locked": lambda: build(LOCKED, 3),
    "locked_over": lambda: build(OverConfig(CLIP, hidden=8, embed_dim=6, dropout=0.0), 3),
    "vilt": lambda: build(VILT, 3),
    "vilt_tied": lambda: build(dataclasses.replace(VILT, tied=True), 3),
    "vilt_classifier": lambda: classifier_from_vilt(_vilt(), "vqa", ANSWERS, 3),
    "vilt_single": lambda: classifier_from_vilt(_vilt(), "nlvr", TRUTH, 3),
    "vilt_nlvr": lambda: pair_from_vilt(_vilt(), 3),
    "vilt_entailment": lambda: classifier_from_vilt(_vilt(), "entailment", ENTAILMENT, 3),
    "albef": lambda: build(ALBEF, 3),
    "albef_retrieval": lambda: build(dataclasses.replace(ALBEF, words=False), 3),
    "albef_vqa": lambda: vqa_from_albef(_albef(), 3),
    "albef_nlvr": lambda: nlvr_from_albef(_albef(), 3),
    "albef_assignment": lambda: nlvr_from_albef(_albef(), 3, classes=ASSIGNED),
    "albef_assigned": lambda: nlvr_from_albef(filled(nlvr_from_albef(_albef(), classes=ASSIGNED)), 3),
    "albef_classifier": lambda: classifier_from_albef(_albef(), "entailment", ENTAILMENT, 3),
    "albef_closed": lambda: classifier_from_albef(_albef(), "vqa", ANSWERS, 3),
    "albef_single": lambda: classifier_from_albef(_albef(), "nlvr", TRUTH, 3),
    "albef_pictures": lambda: classifier_from_albef(_albef(), "classification", ANSWERS, 3),
}
"""As each is initialised: with its seed, or from a pretrained model."""

CLASSES = tuple(kind.name for kind in kinds())
"""The classes of models that a checkpoint may hold."""


def tokenizer_of(model: Any) -> Tokenizer | BpeTokenizer:
    """A tokenizer of VOCAB tokens, for texts cleaned as the model's released code cleans them."""
    kind = kind_of(model)
    if kind.tokenizer is Tokenizer:
        return Tokenizer(TOKENS, kind.cleaning)
    letters = [chr(97 + index) for index in range(10)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ab", "ab</w>", STARTS, ENDS]
    return BpeTokenizer(tokens, [("a", "b"), ("a", "b</w>")], kind.cleaning)


# ---------------------------------------------------------------------- batches


def _rows(count: int) -> dict[str, Any]:
    """What every batch has, of texts of 3 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(SPECIALS), START, (count, LENGTH), generator=generator)
    lengths = torch.tensor([7, 5, 6, 5, 4, 3, 7, 6])[:count]
    ids[:, 0] = CLS
    ids[torch.arange(count), lengths - 1] = SEP
    ids[torch.arange(LENGTH) >= lengths[:, None]] = PAD
    row = torch.arange(count)
    return {
        "ids": ids, "mask": ids != PAD, "image_index": row, "text_index": row.clone(), "example": row.clone(),
        "weight": torch.ones(count), "sided": torch.zeros(count, dtype=torch.bool), "texts": [""] * count, "step": 0,
        "epoch": 0,
    }  # fmt: skip


def pixels(*shape: int) -> Tensor:
    """uint8 [*shape, 3, SIZE, SIZE]."""
    return torch.randint(
        0, 256, (*shape, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


def pairs() -> Batch:
    """8 pairs; the fourth has the second's text, the sixth the fifth's picture."""
    rows, seen = _rows(8), pixels(8)
    rows["ids"][3], rows["text_index"][3] = rows["ids"][1], 1
    seen[5], rows["image_index"][5] = seen[4], 4
    return Batch(**rows, pixels=seen)


def clip_pairs(size: int = SIZE) -> Batch:
    """`pairs` as CLIP reads texts."""
    batch = pairs()
    ids = batch.ids.masked_fill(batch.ids == SEP, END)
    ids[:, 0] = START
    return dataclasses.replace(batch, ids=ids, pixels=batch.pixels.repeat(1, 1, size // SIZE, size // SIZE))


def questions() -> TaskBatch:
    """3 questions with up to 3 answers each; the second has one, whose copies weigh nothing."""
    ids = torch.tensor(
        [
            [[CLS, 7, SEP, 0], [CLS, 8, 17, SEP], [CLS, 12, SEP, 0]],
            [[CLS, 6, SEP, 0], [CLS, 6, SEP, 0], [CLS, 6, SEP, 0]],
            [[CLS, 20, SEP, 0], [CLS, 9, 18, SEP], [CLS, 15, SEP, 0]],
        ]
    )
    weights = torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0], [0.3, 0.1, 0.06]])
    return TaskBatch(
        **_rows(3), pixels=pixels(3), answer_ids=ids, answer_mask=ids != PAD, answer_weight=weights
    )


def closed() -> TaskBatch:
    """Questions over ANSWERS: what each is worth."""
    worth = [[1.0, 0.0, 0.3, 0.0], [0.0, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 1.0]]
    return TaskBatch(**_rows(4), pixels=pixels(4), targets=torch.tensor(worth))


def labelled(classes: int, pictures: int = 1) -> TaskBatch:
    """5 texts with their labels, about one picture each or two."""
    label = torch.tensor([0, 2, 1, 1, 2]) % classes
    return TaskBatch(**_rows(5), pixels=pixels(5, 2) if pictures == 2 else pixels(5), label=label)


def masking(whole_words: bool) -> Masking:
    """Half of the words, so that a batch of a few hides some."""
    place = torch.arange(VOCAB)
    fixed = (place < len(SPECIALS)) | (place >= START)
    continues = (place >= len(SPECIALS) + len(WORDS)) & ~fixed
    return Masking(MASK, fixed, continues, 0.5, whole_words)


# ---------------------------------------------------------------------- what is measured


@torch.no_grad()
def outputs(name: str, model: Any) -> dict[str, Tensor]:
    """What the model named so in MODELS computes of its batch, every way there is."""
    model = model.eval()
    if hasattr(model, "judge"):
        batch = labelled(2, model.pictures)
        seen = batch.pixels if model.pictures == 2 else batch.pixels[:, None]
        return {"judge": model.judge(batch.ids, batch.mask, seen)}
    if name.startswith("clip"):
        batch = clip_pairs(model.config.image_size)
        return {
            "image": model.embed_image(model.encode_image(batch.pixels)),
            "text": model.embed_text(batch.ids),
        }
    if name.startswith("locked"):
        batch = pairs() if name == "locked" else clip_pairs()
        image = model.embed_image(model.encode_image(batch.pixels))
        return {"image": image, "text": model.embed_text(batch.ids, batch.mask)}
    if name.endswith("_vqa"):
        asked = questions()
        question = model.encode_question(asked.ids, asked.mask, model.encode_image(asked.pixels))
        answer, mask = asked.answer_ids.flatten(0, 1), asked.answer_mask.flatten(0, 1)
        logits = model.answer_logits(answer, mask, model.prefill_cross(question), asked.mask)
        return {"question": question, "answer": logits}
    batch = pairs()
    if name.startswith("vilt"):
        states = model.fuse(batch.ids, batch.mask, model.encode_image(batch.pixels))
        return {"match": model.match_logits(states), "words": model.word_logits(states.text)}
    tokens = model.encode_image(batch.pixels)
    found = {"tokens": tokens}
    if name != "blip_captioner":
        found["image"] = model.embed_image(tokens)
        found["text"] = model.embed_text(batch.ids, batch.mask)
        found["match"] = model.match_logits(batch.ids, batch.mask, tokens)
        found["states"] = model.encode_text(batch.ids, batch.mask)
    if name.startswith("blip") and name != "blip_filter":
        found["lm"] = model.lm_logits(batch.ids, batch.mask, tokens)
    if name == "albef":
        found["mlm"] = model.mlm_logits(batch.ids, batch.mask, model.prefill_cross(tokens))
    return found


@dataclass(frozen=True)
class Objective:
    """A model of MODELS in training: its objective, a batch for it, and the weight of the momentum's word."""

    model: str
    train: Callable[[Any], Any]
    batch: Callable[[], Batch]
    alpha: float = 0.0


def _blip_pretraining(**options: Any) -> Callable[[Any], Any]:
    return lambda model: BlipPretraining(model, PretrainingConfig(**options))


def _albef_pretraining(**options: Any) -> Callable[[Any], Any]:
    return lambda model: AlbefPretraining(model, masking(False), AlbefObjective(**options))


def _vilt_pretraining(**options: Any) -> Callable[[Any], Any]:
    return lambda model: ViltTraining(model, masking(True), MatchingConfig(**options))


def _softmax(model: Any) -> Any:
    return ClassifierTraining(model, softmax=True)


def _followed(model: Any) -> Any:
    return ClassifierTraining(model, momentum=0.9)


RETRIEVAL = {"objectives": ("itc", "itm"), "queue_size": 12, "momentum": 0.9}

OBJECTIVES: Mapping[str, Objective] = {
    "blip pretraining": Objective("blip", _blip_pretraining(queue_size=12, momentum=0.9), pairs, 0.4),
    "blip pretraining, no momentum": Objective("blip", _blip_pretraining(queue_size=0, momentum=None), pairs),
    "blip pretraining, single positives": Objective(
        "blip", _blip_pretraining(queue_size=6, multi_positive=False, weights={"itm": 0.5}), pairs, 0.4
    ),
    "blip captioner": Objective("blip", _blip_pretraining(objectives=("lm",), prompt_length=2), pairs),
    "blip captioner, half": Objective("blip_captioner", _blip_pretraining(objectives=("lm",)), pairs),
    "blip filter": Objective("blip_filter", _blip_pretraining(**RETRIEVAL, own_negatives=True), pairs, 0.4),
    "blip vqa": Objective("blip_vqa", VqaTraining, questions),
    "blip vqa, closed, sigmoid": Objective("blip_closed", ClassifierTraining, closed),
    "blip vqa, closed, softmax": Objective("blip_closed", _softmax, closed),
    "blip nlvr": Objective("blip_nlvr", ClassifierTraining, lambda: labelled(2, 2)),
    "blip nlvr, one picture": Objective("blip_single", ClassifierTraining, lambda: labelled(2)),
    "blip entailment": Objective("blip_classifier", ClassifierTraining, lambda: labelled(3)),
    "blip classification": Objective("blip_pictures", ClassifierTraining, lambda: labelled(4)),
    "clip softmax": Objective("clip", ClipTraining, clip_pairs),
    "clip softmax, chunks": Objective(
        "clip", lambda model: ClipTraining(model, ContrastConfig(chunk=3)), clip_pairs
    ),
    "clip sigmoid": Objective(
        "clip_sigmoid", lambda model: ClipTraining(model, ContrastConfig("sigmoid")), clip_pairs
    ),
    "clip resnet": Objective("clip_resnet", ClipTraining, lambda: clip_pairs(32)),
    "locked": Objective("locked", LockedTraining, pairs),
    "locked over a CLIP": Objective("locked_over", LockedTraining, clip_pairs),
    "vilt pretraining": Objective("vilt", _vilt_pretraining(), pairs),
    "vilt pretraining, some patches": Objective(
        "vilt", _vilt_pretraining(max_patches=3, alignment=0.5), pairs
    ),
    "vilt pretraining, tied words": Objective("vilt_tied", _vilt_pretraining(), pairs),
    "vilt retrieval": Objective("vilt", lambda model: RankingTraining(model, 3), pairs),
    "vilt vqa, closed, sigmoid": Objective("vilt_classifier", ClassifierTraining, closed),
    "vilt vqa, closed, softmax": Objective("vilt_classifier", _softmax, closed),
    "vilt nlvr": Objective("vilt_nlvr", ClassifierTraining, lambda: labelled(2, 2)),
    "vilt nlvr, one picture": Objective("vilt_single", ClassifierTraining, lambda: labelled(2)),
    "vilt entailment": Objective("vilt_entailment", ClassifierTraining, lambda: labelled(3)),
    "albef pretraining": Objective("albef", _albef_pretraining(queue_size=12, momentum=0.9), pairs, 0.4),
    "albef pretraining, no momentum": Objective(
        "albef", _albef_pretraining(queue_size=0, momentum=None), pairs
    ),
    "albef retrieval": Objective(
        "albef_retrieval",
        lambda model: AlbefPretraining(model, None, AlbefObjective(**RETRIEVAL)),
        pairs,
        0.4,
    ),
    "albef vqa": Objective(
        "albef_vqa", lambda model: VqaTraining(model, AnsweringConfig(0.0), momentum=0.9), questions, 0.4
    ),
    "albef vqa, closed, sigmoid": Objective("albef_closed", ClassifierTraining, closed),
    "albef vqa, closed, softmax": Objective("albef_closed", _softmax, closed),
    "albef nlvr": Objective("albef_nlvr", _followed, lambda: labelled(2, 2), 0.4),
    "albef nlvr, one picture": Objective("albef_single", _followed, lambda: labelled(2), 0.4),
    "albef entailment": Objective("albef_classifier", _followed, lambda: labelled(3), 0.4),
    "albef classification": Objective("albef_pictures", ClassifierTraining, lambda: labelled(4)),
    "albef text assignment": Objective(
        "albef_assignment", lambda model: TextAssignment(model, _albef().vision_proj), pairs
    ),
}
"""Every objective of every family, on a batch of its own."""


def steps(objective: Objective, count: int = 3, rate: float = 0.1) -> list[dict[str, float]]:
    """The losses and figures of each of `count` steps of gradient descent: gradients count as much as losses."""
    module = objective.train(filled(MODELS[objective.model](), seed=1)).train()
    weights = [each for each in module.parameters() if each.requires_grad]
    optimiser = torch.optim.SGD(weights, rate)
    torch.manual_seed(5)
    found = []
    for _ in range(count):
        losses = module.losses(objective.batch(), objective.alpha, 0.5)
        optimiser.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if hasattr(module, "after_step"):
            module.after_step()
        found.append({name: each.item() for name, each in losses.items()})
    return found
