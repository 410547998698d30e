"""What `registry.TASKS` names: a model, data and options in, an `Outcome` out.

What lives here: what each protocol takes from the options, its words, its baselines, and which image each unit belongs to.
What does not: the protocols' arithmetic, which is in the modules called here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from capfilt.data.corpus import Corpus
from capfilt.data.example_set import ExampleSet, PixelBatches
from capfilt.errors import UserError
from capfilt.inference.capabilities import EmbedsImagesAndTexts, MatchesPairs
from capfilt.inference.decoding import RELEASED
from capfilt.tasks import classification, pair_judging
from capfilt.tasks.captioning import bleu_parts, caption_metrics, evaluate_captioning
from capfilt.tasks.classification import TEMPLATES, ClassificationResult
from capfilt.tasks.coco_caption import coco_figures
from capfilt.tasks.outcome import Outcome, Units, pack, units
from capfilt.tasks.registry import Progress, Unsuited
from capfilt.tasks.retrieval import (
    DEPTHS,
    FUSED_TIE,
    RetrievalEvaluation,
    RetrievalResult,
    evaluate_retrieval,
    from_scores,
    match_ids,
)

if TYPE_CHECKING:
    from capfilt.stages.evaluate import EvaluateOptions

_PAIRS = 1 << 14


def _batches(corpus: Corpus, options: EvaluateOptions) -> PixelBatches:
    return PixelBatches(corpus.images, len(corpus.image_ids), options.batch_size)


def retrieval(model: Any, corpus: Corpus, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`retrieval`; a model that only matches pairs scores all of them."""
    batches = _batches(corpus, options)
    owners = [corpus.image_ids[row] for row in corpus.image_of_text.tolist()]
    if isinstance(model, EmbedsImagesAndTexts):
        found = evaluate_retrieval(
            model,
            batches,
            corpus.image_ids,
            corpus.texts,
            owners,
            rerank_k=options.rerank,
            progress=progress,
        )
    else:
        owner = match_ids(corpus.image_ids, owners)
        table = _all_pairs(model, batches, len(corpus.image_ids), corpus.texts, progress)
        found = RetrievalEvaluation(from_scores(table, owner, tie=FUSED_TIE), None)
    best = found.itm or found.itc
    if found.itm is not None:
        protocol = f"re-ranked by ITM, k = {options.rerank}; logit + cosine"
    elif isinstance(model, EmbedsImagesAndTexts):
        protocol = "cosine of ITC embeddings"
    else:
        protocol = (
            f"every image with every text, {len(corpus.image_ids)} x {len(corpus)} pairs, by match logit"
        )
    metrics: dict[str, float] = {}
    made: dict[str, Units] = {}
    for prefix, result in (("", best), ("itc_", found.itc)):
        if prefix and not isinstance(model, EmbedsImagesAndTexts):
            continue
        metrics |= {prefix + name: value for name, value in result.metrics.items()}
        made |= {prefix + name: each for name, each in _retrieval_units(result, corpus.image_ids).items()}
    return Outcome(
        f"{protocol}; ties count against the model",
        metrics,
        made,
        {"images": len(corpus.image_ids), "texts": len(corpus)},
        _retrieval_chance(best),
        {"image_ranks": pack(best.image_ranks), "text_ranks": pack(best.text_ranks)},
    )


def _all_pairs(
    model: MatchesPairs, batches: Iterable[Tensor], images: int, texts: Sequence[str], progress: Progress
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Match logits float32 [images, texts]: 4 bytes per pair, and no more than `_PAIRS` pairs in the model's hands at once."""
    # Equal texts are read once: cheaper, and in bf16 the only way to make them tie.
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    distinct = list(number)
    table = np.empty((images, len(distinct)), dtype=np.float32)
    start = 0
    for batch in batches:
        tokens = model.encode_images(batch)
        stop = start + len(tokens)
        step = max(1, _PAIRS // len(tokens))
        for first in range(0, len(distinct), step):
            some = distinct[first : first + step]
            index = torch.arange(len(tokens)).repeat_interleave(len(some))
            found = model.match(tokens, index, some * len(tokens))
            table[start:stop, first : first + len(some)] = found.float().cpu().view(len(tokens), -1).numpy()
            progress("pairs", start * len(distinct) + len(tokens) * (first + len(some)), table.size)
        start = stop
    which = [number[text] for text in texts]
    return table if len(which) == len(distinct) else table[:, which]


def _retrieval_units(result: RetrievalResult, image_ids: Sequence[str]) -> dict[str, Units]:
    made = {}
    names = np.array(image_ids)
    for metric in result.metrics:
        if metric != "r_mean":
            made[metric] = units("mean", result.hits(metric), names[result.groups(metric)])
    # R-mean is a mean over two kinds of query; its units are the images, with their queries' hits and numbers.
    asked = np.flatnonzero(result.image_ranks)
    columns = []
    for direction in ("tr", "ir"):
        for depth in DEPTHS:
            metric = f"{direction}@{depth}"
            groups = result.groups(metric)
            columns.append(np.bincount(groups, weights=result.hits(metric), minlength=len(names))[asked])
            columns.append(np.bincount(groups, minlength=len(names))[asked])
    made["r_mean"] = units("ratios", columns, names[asked])
    return made


def _retrieval_chance(result: RetrievalResult) -> dict[str, float]:
    """The recalls of a random order: exact, as no right answer among K drawn without replacement."""
    images, texts = len(result.image_ranks), len(result.text_ranks)
    owned = np.bincount(result.image_of_text, minlength=images)
    found = {}
    for depth in DEPTHS:
        miss = [
            math.comb(texts - own, depth) / math.comb(texts, depth) if texts >= depth else 0.0
            for own in owned[owned > 0].tolist()
        ]
        found[f"tr@{depth}"] = 100.0 * (1.0 - sum(miss) / len(miss))
        found[f"ir@{depth}"] = 100.0 * min(depth, images) / images
    return found | {"r_mean": sum(found.values()) / len(found)}


def captioning(model: Any, corpus: Corpus, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`captioning`, judged by capfilt's scorers or by pycocoevalcap's."""
    references: list[list[str]] = [[] for _ in corpus.image_ids]
    for row, text in zip(corpus.image_of_text.tolist(), corpus.texts, strict=True):
        references[row].append(text)
    written = evaluate_captioning(
        model,
        _batches(corpus, options),
        references,
        progress=lambda done, of: progress("captions", done, of),
        method=options.method,
        num_beams=options.num_beams,
        beam_rule=options.beam_rule,
        prompt=options.prompt,
        max_new_tokens=options.max_new_tokens,
    )
    metrics: dict[str, float] = dict(written.metrics)
    columns = {"cider": written.cider, "rouge_l": written.rouge_l}
    parts, skipped, scorer = written.bleu, {}, "capfilt's scorers and tokens"
    if options.caption_scorer == "pycocoevalcap":
        theirs = coco_figures(written.captions, references)
        metrics, columns, skipped = theirs.metrics, theirs.per_image, theirs.skipped
        parts, scorer = bleu_parts(*theirs.tokens), f"pycocoevalcap's scorers, {theirs.tokenizer}"
    made = {name: units("mean", each / 100.0, corpus.image_ids) for name, each in columns.items()}
    made["bleu@4"] = units("bleu4", list(parts.T), corpus.image_ids)
    decoding = options.method
    if options.method == "beam":
        rule = ", the released rule" if options.beam_rule == RELEASED else ""
        decoding = f"beam, {options.num_beams} beams{rule}"
    constant = _constant_caption(references)
    return Outcome(
        f"{decoding}, at most {options.max_new_tokens} tokens, prompt {options.prompt!r}; {scorer}",
        metrics,
        made,
        {"images": len(references), "texts": len(corpus)},
        constant,
        {
            "captions": dict(zip(corpus.image_ids, written.captions, strict=True)),
            **({"skipped": skipped} if skipped else {}),
        },
    )


def _constant_caption(references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What one and the same caption for every image comes to: the reference whose words are the most common."""
    words: dict[str, int] = {}
    for texts in references:
        for word in {word for text in texts for word in text.lower().split()}:
            words[word] = words.get(word, 0) + 1
    every = sorted({text for texts in references for text in texts})
    common = max(
        every, key=lambda text: sum(words[word] for word in text.lower().split()) / (3 + len(text.split()))
    )
    found = caption_metrics([common] * len(references), references).metrics
    return {name: found[name] for name in ("bleu@4", "rouge_l", "cider")}


def prompts(named: str) -> tuple[str, ...]:
    """The templates called `named`, or the lines of the file at it. Raises UserError where there is none."""
    if named in TEMPLATES:
        return TEMPLATES[named]
    try:
        lines = Path(named).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--templates {named}: is none of {', '.join(TEMPLATES)}, and no file that can be read ({error})"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def chosen_prompts(options: EvaluateOptions) -> list[str]:
    """The templates themselves, which a file's name does not tell."""
    return list(prompts(options.templates))


def _classes(examples: ExampleSet) -> tuple[list[int], list[str]]:
    """(the picture, the label) of each example that has both."""
    rows = [row for row, label in enumerate(examples.labels) if label is not None]
    return [examples.pictures[row][0] for row in rows], [str(examples.labels[row]) for row in rows]


def _class_baselines(labels: Sequence[str]) -> tuple[float, float]:
    """(chance, the largest class's share), percent."""
    counts = {label: labels.count(label) for label in set(labels)}
    return 100.0 / len(counts), 100.0 * max(counts.values()) / len(labels)


def zero_shot(model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`zero-shot` by ITC embeddings and prompts."""
    pictures, labels = _classes(examples)
    vectors = []
    for batch in examples.image_batches(options.batch_size):
        vectors.append(model.embed_images(model.encode_images(batch)).float().cpu())
        progress("images", sum(map(len, vectors)), len(examples.image_ids))
    templates = prompts(options.templates)
    found = classification.zero_shot(model, torch.cat(vectors)[pictures], labels, templates)
    chance, majority = _class_baselines(labels)
    classes = len(set(labels))
    return Outcome(
        f"{classes} classes by cosine with the mean of {len(templates)} prompts ({options.templates}); single: 'a photo of "
        "a {}.'",
        found.metrics,
        _hits(found, [examples.image_ids[row] for row in pictures]),
        {"images": len(set(pictures)), "examples": len(labels), "classes": classes},
        {name: min(100.0, chance * int(name.rpartition("top")[2])) for name in found.metrics}
        | {"zero_shot_top1": max(chance, majority)},
    )


def trained_classes(
    model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress
) -> Outcome:
    """`classification` by a classifier of pictures alone; a class it was not trained for is never right."""
    pictures, labels = _classes(examples)
    if model.pictures != 1 or not set(labels) & set(model.labels):
        raise Unsuited(
            f"--tasks classification: the model tells {', '.join(model.labels[:3])}, ... apart and none of the examples' "
            "classes; finetune one with `capfilt finetune classification`"
        )
    logits = []
    for batch in examples.image_batches(options.batch_size):
        logits.append(model.classify(batch[:, None], [""] * len(batch)))
        progress("images", sum(map(len, logits)), len(examples.image_ids))
    found = classification.by_logits(torch.cat(logits)[pictures], model.labels, labels)
    chance, majority = _class_baselines(labels)
    classes = len(set(labels))
    return Outcome(
        f"{classes} classes by a classifier of {len(model.labels)}, trained on examples of them",
        found.metrics,
        _hits(found, [examples.image_ids[row] for row in pictures]),
        {"images": len(set(pictures)), "examples": len(labels), "classes": classes},
        {name: min(100.0, chance * int(name.rpartition("top")[2])) for name in found.metrics}
        | {"classification_top1": max(chance, majority)},
    )


def few_shot(model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`few-shot` on frozen image features."""
    assert examples.support is not None
    shots = _shots(options.shots)
    sides = []
    for each in (examples, examples.support):
        rows = []
        for batch in each.image_batches(options.batch_size):
            rows.append(model.image_features(batch).float().cpu())
            progress("images", sum(map(len, rows)), len(each.image_ids))
        pictures, labels = _classes(each)
        sides.append((torch.cat(rows)[pictures] if rows else torch.zeros(0, 1), labels, pictures))
    (features, labels, pictures), (support, support_labels, _) = sides
    found = classification.few_shot(
        features, labels, support, support_labels,
        shots=shots, seeds=options.draws, seed=options.seed, progress=progress,
    )  # fmt: skip
    chance, majority = _class_baselines(labels)
    return Outcome(
        f"frozen image features; linear probe by L-BFGS, penalty chosen on min(k, 4) further examples per class, and "
        f"nearest class mean; mean of {options.draws} draws",
        found.metrics,
        _hits(found, [examples.image_ids[row] for row in pictures]),
        {
            "images": len(set(pictures)),
            "examples": len(labels),
            "classes": len(set(labels)),
            "to learn from": len(support_labels),
        },
        dict.fromkeys(found.metrics, max(chance, majority)),
        {"spread over draws": found.spread, "penalties": found.penalties, "left_out": found.left_out},
    )


def _shots(given: str) -> list[int]:
    try:
        shots = sorted({int(each) for each in given.split(",")})
    except ValueError:
        shots = []
    if not shots or shots[0] < 1:
        raise UserError(f"--shots {given!r}: write numbers of 1 or more, with commas between")
    return shots


def _hits(found: ClassificationResult, images: Sequence[str]) -> dict[str, Units]:
    return {name: units("mean", hits, images) for name, hits in found.hits.items()}


def match(model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`match`: pairs labelled match or no-match."""
    scores = _scores(model, examples, options, progress)
    labels = [label == "match" for label in examples.labels]
    tuning, words = None, ""
    support = examples.support
    if support is not None and len({*support.labels}) == 2:
        tuning = (
            _scores(model, support, options, progress),
            [label == "match" for label in support.labels],
        )
        words = f"; tuned: at the threshold best on {len(support)} other pairs"
    found = pair_judging.judge_matches(scores, labels, tuning)
    majority = 100.0 * max(np.mean(labels), 1 - np.mean(labels))
    baselines = {name: 50.0 if "auc" in name else float(majority) for name in found.metrics}
    return _judged(found, examples, f"ITM is a match at 0.5{words}", baselines)


def rating(model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`rating`: the numbers that annotators gave are the answers."""
    try:
        ratings = [
            [float(answer) for answer, count in answers for _ in range(count)] for answers in examples.answers
        ]
    except ValueError as error:
        raise Unsuited(f"rating: an answer is no number ({error}); ingest the ratings as numbers") from error
    found = pair_judging.judge_ratings(_scores(model, examples, options, progress), ratings)
    protocol = (
        "Kendall's tau-c with every single rating (mean: with a pair's mean); Spearman with the mean; the pictures' own "
        "captions left out"
    )
    return _judged(found, examples, protocol, dict.fromkeys(found.metrics, 0.0))


def choice(model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress) -> Outcome:
    """`choice`: the right text above every wrong one."""
    pictures: list[int] = []
    texts: list[str] = []
    right: list[int] = []
    wrong: list[list[int]] = []
    for (picture, *_), text, others in zip(
        examples.pictures, examples.texts, examples.wrong_texts, strict=True
    ):
        right.append(len(texts))
        wrong.append(list(range(len(texts) + 1, len(texts) + 1 + len(others))))
        texts += [text or "", *others]
        pictures += [picture] * (1 + len(others))
    batches = examples.image_batches(options.batch_size)
    scores = pair_judging.score_pairs(model, batches, pictures, texts, progress=progress)
    found = pair_judging.judge_choices(scores, wrong, right, examples.categories)
    chance = 100.0 * float(np.mean([1 / (1 + len(others)) for others in wrong]))
    return _judged(
        found,
        examples,
        "the right text scores above every wrong one; ties are wrong; macro: mean over categories",
        dict.fromkeys(found.metrics, chance),
    )


def _scores(
    model: Any, examples: ExampleSet, options: EvaluateOptions, progress: Progress
) -> pair_judging.Scores:
    pictures = [places[0] for places in examples.pictures]
    texts = [text or "" for text in examples.texts]
    return pair_judging.score_pairs(
        model, examples.image_batches(options.batch_size), pictures, texts, progress=progress
    )


def _judged(
    found: pair_judging.JudgingResult, examples: ExampleSet, protocol: str, baselines: dict[str, float]
) -> Outcome:
    images = np.array([examples.image_ids[places[0]] for places in examples.pictures])
    return Outcome(
        protocol,
        found.metrics,
        {
            name: units(found.statistics[name], columns, images[found.rows[name]])
            for name, columns in found.columns.items()
        },
        {"images": len(set(images.tolist())), "examples": len(examples)},
        baselines,
    )
