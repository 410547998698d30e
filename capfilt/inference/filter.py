"""The filter: does this text match this image? Thresholds and verdicts are the select stage's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capfilt.errors import UserError
from capfilt.inference.engine import Engine, Images


@dataclass(frozen=True)
class Score:
    """itm_score: softmax of the image-grounded encoder's logits at "match", [0, 1]; itc_score: cosine, [-1, 1]."""

    itm_score: float
    itc_score: float


class Filter(Engine):
    """Scores texts against images. Load with `Filter.load(path)`."""

    half = "filter"

    def score(self, images: Images, texts: Sequence[str], batch_size: int = 0) -> list[Score]:
        """Score i is of images[i] with texts[i]; the same image object or path given several times is encoded once.

        Raises UserError for lists of different lengths and for an image that cannot be read (named by its index).
        """
        if len(images) != len(texts):
            raise UserError(f"{len(images)} images and {len(texts)} texts: score wants one text per image")
        if not isinstance(images, Sequence):
            return self.score_texts(images, range(len(texts)), texts, batch_size)
        first: dict[object, int] = {}
        # Identity for PIL images: they compare by their pixels, which costs more than encoding some.
        unique = [
            first.setdefault(each if isinstance(each, bytes | str) else id(each), i)
            for i, each in enumerate(images)
        ]
        return self.score_texts(images, unique, texts, batch_size)

    @torch.inference_mode()
    def score_texts(
        self,
        images: Images,
        image_index: Sequence[int] | Tensor,
        texts: Sequence[str],
        batch_size: int = 0,
        max_text_tokens: int = 0,
    ) -> list[Score]:
        """Score j is of images[image_index[j]] with texts[j]; an image is encoded once, however many texts it has.

        Texts are cut to `max_text_tokens`; 0 is the model's own (35: BLIP, arXiv 2201.12086, code for retrieval).
        batch_size: images, and texts, at a time; 0 for as many as fit.
        """
        index = [int(each) for each in image_index]
        if len(index) != len(texts):
            raise UserError(f"{len(index)} image indices and {len(texts)} texts: give one per text")
        if index and not 0 <= min(index) <= max(index) < len(images):
            raise UserError(
                f"image_index runs from {min(index)} to {max(index)}; there are {len(images)} images"
            )
        config = self.model.config
        limit = min(max_text_tokens or config.max_text_tokens, config.text.max_positions)
        if limit < 2:
            raise UserError(f"max_text_tokens is {max_text_tokens}: [CLS] and [SEP] alone are 2")
        rows = self.tokenizer.encode_ragged(texts, max_length=limit, max_words=config.max_words or None)
        texts_of: dict[int, list[int]] = {}
        for text, image in enumerate(index):
            texts_of.setdefault(image, []).append(text)
        wanted = sorted(texts_of)

        def judged(first: int, last: int) -> list[tuple[int, Score]]:
            chunk = wanted[first:last]
            found = []
            with self.autocast():
                tokens = self.tokens(images, chunk)
                vectors = self.model.embed_image(tokens)
                cross = self.cross(tokens)
                # Texts of like length side by side, for the least padding.
                order = sorted(
                    (len(rows[text]), text, row)
                    for row, image in enumerate(chunk)
                    for text in texts_of[image]
                )
                for part in buckets(order, last - first):
                    # An image's texts side by side, as `shared` wants them.
                    part.sort(key=lambda each: each[2])
                    ids, mask = self.tokenizer.pad([rows[text] for _, text, _ in part])
                    ids, mask = ids.to(self.device), mask.to(self.device)
                    rows_of = [row for _, _, row in part]
                    of = torch.tensor(rows_of, device=self.device)
                    seen = shared(rows_of)
                    here: slice | Tensor = slice(seen[0], seen[-1] + 1)
                    if seen != list(range(seen[0], seen[-1] + 1)):
                        here = torch.tensor(seen, device=self.device)
                    cross_of = [(keys[here], values[here]) for keys, values in cross]
                    itm = self.model.match_logits(ids, mask, cross_of).softmax(-1)[:, 1]
                    itc = (self.model.embed_text(ids, mask) * vectors[of]).sum(-1).clamp(-1, 1)
                    for (_, text, _), a, b in zip(part, itm.tolist(), itc.tolist(), strict=True):
                        found.append((text, Score(a, b)))
            return found

        scores = dict(self.in_batches(len(wanted), self.batch_size(batch_size), judged))
        return [scores[text] for text in range(len(texts))]


def shared(rows: Sequence[int]) -> list[int]:
    """Of which images, numbered in `rows` text by text and ascending, keys and values are wanted: each once where all have as
    many texts, whose tokens are then so many more queries of one image (see `CrossAttention.attend`), and without a copy where
    the images lie side by side; else one per text.
    """
    counts = Counter(rows)
    return list(counts) if len(set(counts.values())) == 1 else list(rows)


BUCKET = 8


def buckets(order: Sequence[tuple[int, int, int]], most: int) -> list[list[tuple[int, int, int]]]:
    """`order` (length first, ascending) in groups of at most `most` whose lengths end in the same `BUCKET` tokens."""
    groups: list[list[tuple[int, int, int]]] = []
    for each in order:
        same = (
            groups and len(groups[-1]) < most and (groups[-1][0][0] - 1) // BUCKET == (each[0] - 1) // BUCKET
        )
        if not same:
            groups.append([])
        groups[-1].append(each)
    return groups
