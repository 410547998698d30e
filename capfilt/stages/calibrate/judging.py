"""Signals of how well a text fits a picture: cosine, hub correction, match, human neighbours, captions, the text's own words.

Not here: which pairs are judged (`judge.py`, `held_out.py`), how signals become one score (`capfilt.calibration`).
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capfilt.calibration.hubs import Bank
from capfilt.calibration.neighbours import Neighbours
from capfilt.data.cleaning import clean
from capfilt.errors import UserError
from capfilt.plugins.checkpoints import FamilyScorer
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.held_out import human_texts, of_smallest_hash
from capfilt.stages.folds import members
from capfilt.stages.pixels import pictures
from capfilt.stages.remembering import remembering
from capfilt.tables.ids import fold_of
from capfilt.tables.sealed import fingerprint
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, folded
from capfilt.tables.workspace import Workspace

COSINE, HUB, MATCH = "itc_score", "hub_score", "itm_score"
NEAR_PICTURES, NEAR_TEXTS = "image_neighbours", "text_neighbours"
AGREEMENT = "caption_agreement"
WORDS, UNKNOWN = "words", "unknown_words"
MEANINGS: Mapping[str, str] = {
    COSINE: "cosine of the image and text embeddings, in [-1, 1]; of several filters the mean",
    HUB: "that cosine less what picture and text have with random pairs (docs/calibration.md)",
    MATCH: "softmax of the match logits at the class match, in [0, 1]; of several filters the mean",
    NEAR_PICTURES: "best cosine of the text with the texts of each of the 10 nearest human pictures, the mean",
    NEAR_TEXTS: "cosine of the picture with the pictures of the 30 nearest human texts, the weighted mean",
    AGREEMENT: "best cosine of the text with the texts that a captioner wrote for the picture; 0 without one",
    WORDS: "words of the text, as log(1 + count)",
    UNKNOWN: "share of the text's words that no human neighbour has, in [0, 1]",
}
BATCH = 64
BANK_SHARDS = 16
"""Shards that the bank is drawn from, at most: every worker reads their pictures."""
MOST_NEIGHBOURS = 5000
"""Human pictures among which neighbours are looked for: every worker embeds them."""

Vectors = npt.NDArray[np.float32]
_WORD = re.compile(r"\w+")


class Judging:
    """The filters, and the pairs that texts are judged beside: a bank of the judged part, and human neighbours.

    To the stages it is a plug-in whose pictures are pixels in as many sizes as the filters want.
    """

    def __init__(self, options: CalibrateOptions, workspace: Workspace, images: Part) -> None:
        self.options, self.workspace, self.images = options, workspace, images
        how = ("compiled" if options.compile else "", "draft" if options.draft else "")
        self.paths = {name: members(name, workspace) for name in dict.fromkeys(options.filter)}
        self.sets = [
            [FamilyScorer(str(path), options.precision, *how) for path in paths]
            for paths in self.paths.values()
        ]
        self.neighbours = [workspace.input("images", name) for name in options.neighbours]
        if not any(self._able(some, "embed") for some in self.sets):
            raise UserError(
                f"--filter {' '.join(options.filter)}: embeds no pictures and texts, and the hub correction needs that; "
                "give a checkpoint that does (locked, clip, blip, albef)"
            )

    @staticmethod
    def _able(some: Sequence[FamilyScorer], ability: str) -> bool:
        return all(ability in each.abilities for each in some)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of the signals, in order."""
        found = [COSINE, HUB]
        found += [MATCH] * any(self._able(some, "match") for some in self.sets)
        found += [NEAR_PICTURES, NEAR_TEXTS] * bool(self.neighbours)
        # Calibration pictures without captions could not say how much a text that agrees with them is worth.
        found += [AGREEMENT] * bool(self.options.calibration_captions)
        return (*found, WORDS, *([UNKNOWN] * bool(self.neighbours)))

    # ------------------------------------------------------------------ as a plug-in

    @property
    def sizes(self) -> list[int]:
        """The sides of the pictures that the filters take, in pixels."""
        return sorted({each.image_size for some in self.sets for each in some})

    def fingerprint(self) -> str:
        """Of all weights, and of the human neighbours."""
        marks = [[each.fingerprint() for each in some] for some in self.sets]
        return fingerprint({"filters": marks, "neighbours": [part.digest() for part in self.neighbours]})

    def prepare(self, data: bytes) -> dict[int, Any]:
        """The picture in every size."""
        return {size: self._of_size(size).prepare(data) for size in self.sizes}

    def gather(self, images: list[dict[int, Any]]) -> dict[int, torch.Tensor]:
        """The pictures of a batch, by size."""
        return {size: self._of_size(size).gather([each[size] for each in images]) for size in self.sizes}

    def _of_size(self, size: int) -> FamilyScorer:
        return next(each for some in self.sets for each in some if each.image_size == size)

    def computed(self) -> Mapping[str, str]:
        """As the filters say, which have one precision."""
        return self.sets[0][0].computed()

    def setup(self) -> None:
        """Nothing: see `ready`."""

    # ------------------------------------------------------------------ ready

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within it, the filters are on their device, and bank and neighbours are embedded."""
        with contextlib.ExitStack() as stack:
            for each in (each for some in self.sets for each in some):
                each.setup()
                stack.enter_context(remembering(each.model._model, self.workspace))
            self.banks = self._embedded_banks()
            self.humans = self._embedded_humans() if self.neighbours else None
            yield

    @cached_property
    def drawn(self) -> dict[int, dict[str, str]]:
        """The bank's pairs, text by image_id by shard: those of the smallest hashes with the seed, of some shards.

        Looked for before the work travels to workers, and travels along.
        """
        mark = str(self.options.seed).encode()

        def place(name: str) -> bytes:
            return hashlib.blake2b(name.encode(), key=mark).digest()

        shards = sorted(self.images.shards(), key=lambda shard: place(str(shard)))[:BANK_SHARDS]
        columns = [*FOUND_COLUMNS, "status"]
        able = (
            (place(row["image_id"]), shard, row["image_id"], text)
            for shard in sorted(shards)
            for row in self.images.read(shard, columns).to_pylist()
            if row["status"] == "success" and (text := _first(row["captions"])) is not None
        )
        found: dict[int, dict[str, str]] = {}
        for _, shard, image, text in heapq.nsmallest(self.options.bank, able):
            found.setdefault(shard, {})[image] = text
        return found

    def _embedded_banks(self) -> list[list[Bank]]:
        """The bank as each filter that embeds sees it."""
        ids: list[str] = []
        said: list[str] = []
        seen: list[list[list[Vectors]]] = [[[] for _ in some] for some in self.sets]
        for shard, texts in sorted(self.drawn.items()):
            for batch in pictures(self.images, shard, self, BATCH, only=texts):
                if decoded := batch.decoded:
                    ids += decoded
                    said += [texts[image] for image in decoded]
                    for some, lists in zip(self.sets, seen, strict=True):
                        if self._able(some, "embed"):
                            for each, vectors in zip(some, lists, strict=True):
                                vectors.append(self.seen(each, batch.images))
        if len(ids) < 2:
            raise UserError(f"{self.images.path}: fewer than 2 pictures with a text, so there is no bank")
        return [
            [
                Bank(ids, np.concatenate(vectors), read(each.model.embed_texts, said))
                for each, vectors in pairs
            ]
            for pairs in (
                [pair for pair in zip(some, lists, strict=True) if pair[1]]
                for some, lists in zip(self.sets, seen, strict=True)
            )
        ]

    def _embedded_humans(self) -> Neighbours:
        """The human pictures and texts, as the first filter that embeds knows pictures from pictures, texts from texts."""
        ids: list[str] = []
        vectors: list[Vectors] = []
        said: list[tuple[int, str]] = []
        for part in self.neighbours:
            texts: dict[str, list[str]] = {}
            for row in human_texts(part):
                texts.setdefault(row["image_id"], []).append(row["text"])
            chosen = set(of_smallest_hash(texts, MOST_NEIGHBOURS, self.options.seed))
            for shard in part.shards():
                for batch in pictures(part, shard, self, BATCH, only=chosen):
                    if decoded := batch.decoded:
                        said += [
                            (len(ids) + place, text)
                            for place, image in enumerate(decoded)
                            for text in texts[image]
                        ]
                        ids += decoded
                        vectors.append(self.alike(batch.images))
        if len(ids) < 2:
            raise UserError(
                f"--neighbours {' '.join(self.options.neighbours)}: fewer than 2 pictures with a human text; give others"
            )
        words = [text for _, text in said]
        return Neighbours(
            ids,
            np.concatenate(vectors),
            np.array([owner for owner, _ in said]),
            [folded(text) for text in words],
            read(self._first.model.like_texts, words),
        )

    @cached_property
    def known(self) -> frozenset[str]:
        """The words of the human neighbours' texts."""
        said = self.humans.words if self.humans else ()
        return frozenset(word for text in said for word in _WORD.findall(text))

    # ------------------------------------------------------------------ signals

    @property
    def _first(self) -> FamilyScorer:
        return next(some[0] for some in self.sets if self._able(some, "embed"))

    def seen(self, scorer: FamilyScorer, images: Mapping[int, torch.Tensor]) -> Vectors:
        """Unit vectors float32 [B, E] of pictures."""
        model = scorer.model
        return as_array(model.embed_images(model.encode_images(images[scorer.image_size])))

    def alike(self, images: Mapping[int, torch.Tensor]) -> Vectors:
        """Unit vectors float32 [B, D] by which pictures are like pictures."""
        model = self._first.model
        return as_array(model.like_images(model.encode_images(images[self._first.image_size])))

    def signals(
        self,
        images: Mapping[int, torch.Tensor],
        image_ids: Sequence[str],
        image_index: Sequence[int],
        texts: Sequence[str],
        captions: Mapping[str, Sequence[str]],
    ) -> npt.NDArray[np.float64]:
        """float64 [T, columns] of texts; `image_ids` and `image_index`, the place in `images`, are of each text's picture.

        `captions` are what captioners wrote, by image_id.
        """
        index = np.asarray(image_index)
        found: dict[str, list[npt.NDArray[np.float64]]] = {}
        for some, banks in zip(self.sets, self.banks, strict=True):
            folds = np.array([fold_of(image, len(some)) for image in image_ids])
            columns = [
                self._of_filter(each, banks[number] if banks else None, images, image_ids, index, texts)
                if (folds == number).any()
                else {}
                for number, each in enumerate(some)
            ]
            for name in columns[int(folds[0])]:
                found.setdefault(name, []).append(
                    np.choose(folds, [one.get(name, np.zeros(len(texts))) for one in columns])
                )
        out = {name: np.mean(values, axis=0) for name, values in found.items()}
        if self.humans is not None:
            said = [folded(text) for text in texts]
            near = self.humans.agreement(
                image_ids, said, self.alike(images)[index], read(self._first.model.like_texts, texts)
            )
            out |= {NEAR_PICTURES: near[:, 0], NEAR_TEXTS: near[:, 1]}
            out[UNKNOWN] = np.array([self._unknown(text) for text in said])
        out[AGREEMENT] = self._agreement(texts, [captions.get(image, ()) for image in image_ids])
        out[WORDS] = np.log1p([len(text.split()) for text in texts])
        return np.stack([out[name] for name in self.columns], axis=1)

    @staticmethod
    def _of_filter(
        scorer: FamilyScorer,
        bank: Bank | None,
        images: Mapping[int, torch.Tensor],
        image_ids: Sequence[str],
        index: npt.NDArray[np.int64],
        texts: Sequence[str],
    ) -> dict[str, npt.NDArray[np.float64]]:
        found: dict[str, npt.NDArray[np.float64]] = {}
        tokens = scorer.model.encode_images(images[scorer.image_size])
        if bank is not None:
            seen = as_array(scorer.model.embed_images(tokens))[index]
            said = read(scorer.model.embed_texts, texts)
            found[COSINE] = np.einsum("te,te->t", seen, said).astype(np.float64)
            found[HUB] = bank.corrected(image_ids, seen, said)
        if "match" in scorer.abilities:
            order = np.argsort(index, kind="stable")
            values = scorer.model.match_probability(
                tokens, torch.from_numpy(index[order]), [texts[place] for place in order]
            )
            found[MATCH] = np.empty(len(texts))
            found[MATCH][order] = as_array(values)
        return found

    def _agreement(self, texts: Sequence[str], captions: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
        """float64 [T] of texts and their pictures' captions (SIEVE, CVPR 2024: arXiv 2310.02110)."""
        found = np.zeros(len(texts))
        words = {text: place for place, text in enumerate(dict.fromkeys(itertools.chain(*captions)))}
        if AGREEMENT in self.columns and words:
            embed = self._first.model.like_texts
            said, written = read(embed, texts), read(embed, list(words))
            for row, own in enumerate(captions):
                if own:
                    found[row] = (written[[words[text] for text in own]] @ said[row]).max()
        return found

    def _unknown(self, text: str) -> float:
        words = _WORD.findall(text)
        return sum(word not in self.known for word in words) / len(words) if words else 1.0


def as_array(tensor: torch.Tensor) -> Vectors:
    """float32, on the CPU."""
    out: Vectors = tensor.float().cpu().numpy()
    return out


def read(embed: Callable[[list[str]], torch.Tensor], texts: Sequence[str]) -> Vectors:
    """Unit vectors float32 [T, E] of texts."""
    parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return np.concatenate([as_array(embed(list(some))) for some in parts])


def _first(texts: Sequence[str | None] | None) -> str | None:
    return next((text for text in texts or () if text and clean(text)), None)
