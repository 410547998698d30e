"""The captioner: images in, synthetic texts out. Which tokens are chosen is decoding.py's and sampling.py's.

Rows, shards and failures are the caption stage's; it decodes pictures itself and passes tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from capfilt.errors import UserError
from capfilt.inference.decoding import BEAM_RULES, TRANSFORMERS, Decoded, Limits, Writes, beam_search, sample
from capfilt.inference.engine import Engine, Images
from capfilt.inference.graphs import RecordedWriter
from capfilt.inference.sampling import uniforms

METHODS = ("nucleus", "beam", "greedy")


@dataclass(frozen=True)
class Caption:
    """A synthetic text without the prompt, and the sum of log p of its tokens ([SEP] included) given the prompt.

    The probability is the model's own: no temperature, no nucleus, no penalty. Where it is not finite there is no text.
    """

    text: str
    logprob: float


class Captioner(Engine):
    """Writes captions. Load with `Captioner.load(path)`."""

    half = "captioner"

    @torch.inference_mode()
    def caption(
        self,
        images: Images,
        method: str = "nucleus",  # BLIP, arXiv 2201.12086, sec. 4.2: nucleus beats beam search for bootstrapping
        top_p: float = 0.9,  # BLIP, sec. 4.2
        num_beams: int = 3,  # BLIP, code: caption configs
        max_new_tokens: int = 20,
        min_new_tokens: int = 1,  # BLIP, code: min_length 5 counts four prompt slots
        repetition_penalty: float = 1.0,
        prompt: str | None = None,
        seed: int = 0,
        samples: int = 1,
        keys: Sequence[str] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        length_penalty: float = 1.0,
        batch_size: int = 0,
        beam_rule: str = TRANSFORMERS,
    ) -> list[Caption]:
        """`samples` captions per image, image by image: caption k of image i is entry i * samples + k.

        Args:
            images: PIL images, encoded bytes or paths; or a uint8 tensor or array [B, 3, S, S] at the model's size;
                or cached trunk features, floating [B, N, C]; or what `encode` returned.
            method: "nucleus", "beam" (`samples` best texts of `num_beams` beams) or "greedy" (one sample only).
            max_new_tokens, min_new_tokens: lengths in tokens, the prompt's not counted. The longest counts the closing [SEP];
                the shortest does not, so that a text has at least so many tokens.
            prompt: text to continue; None for the model's own ("a picture of "), "" for none.
            seed, keys: caption k of image i is drawn from a stream keyed by (seed, keys[i], k), whatever batch it is
                in; a key defaults to the image's index. (Rounding can differ between batch shapes, so a draw that
                falls within it of a boundary can too.)
            temperature, top_k: of sampling; top_k 0 is off (BLIP's code had, unnoticed, 50).
            length_penalty: of beam search: score = logprob / length ** length_penalty; above 0 favours longer texts.
            beam_rule: which tokens that length counts, and when the search stops: see `beam_search`.
            batch_size: images at a time; 0 for as many as fit.

        Raises:
            UserError: an option out of range, or an image that cannot be read, named by its index.
        """
        _check(method, top_p, num_beams, max_new_tokens, min_new_tokens, samples, top_k)
        if beam_rule not in BEAM_RULES:
            raise UserError(f"beam_rule {beam_rule!r} is unknown: use one of {', '.join(BEAM_RULES)}")
        for name, number in (("repetition_penalty", repetition_penalty), ("temperature", temperature)):
            if not 0 < number < math.inf:
                raise UserError(f"{name} is {number}: it must be above 0 and finite (1.0 is off)")
        if not math.isfinite(length_penalty):
            raise UserError(f"length_penalty is {length_penalty}: it must be finite (1.0 is off)")
        if keys is not None and len(keys) != len(images):
            raise UserError(f"{len(keys)} keys for {len(images)} images: give one per image")
        limits = Limits(
            self.tokenizer.sep_id, self.tokenizer.pad_id, max_new_tokens, min_new_tokens, repetition_penalty
        )
        start = self.prompt_ids(self.model.config.prompt if prompt is None else prompt)
        model = self.writer

        def written(first: int, last: int) -> list[Caption]:
            if isinstance(model, RecordedWriter):
                model.images = min(full, self.fits or full)
            with self.autocast():
                room = model.room if isinstance(model, RecordedWriter) else None
                cross = self.cross(self.tokens(images, range(first, last)), room)
                if method == "beam":
                    count = last - first
                    decoded = beam_search(
                        *(model, cross, start, count, limits, num_beams, samples, length_penalty),
                        rule=beam_rule,
                    )
                else:
                    rows = (last - first) * samples
                    draws = None
                    if method == "nucleus":
                        names = keys[first:last] if keys is not None else [str(i) for i in range(first, last)]
                        draws = uniforms(seed, names, samples, max_new_tokens).to(self.device)
                    decoded = sample(model, cross, start, rows, limits, draws, top_p, top_k, temperature)
            return self.texts(start, decoded)

        size = self.batch_size(batch_size, self.ways(method, samples, num_beams))
        # Who says no size of a batch should not wait for one of many images where there are few.
        full = size if batch_size else min(size, 1 << max(0, len(images) - 1).bit_length())
        return self.in_batches(len(images), size, written)

    @staticmethod
    def ways(method: str, samples: int, num_beams: int) -> int:
        """Texts that are written per image at the same time."""
        return num_beams if method == "beam" else samples

    @cached_property
    def writer(self) -> Writes:
        """The model for the decoding loops: on a GPU with its steps recorded as CUDA graphs."""
        return RecordedWriter(self.model) if self.device.type == "cuda" else self.model

    def release(self) -> None:
        """Forgets recorded steps and their buffers."""
        if isinstance(self.writer, RecordedWriter):
            self.writer.forget()

    def prompt_ids(self, prompt: str) -> Tensor:
        """int64 [P] on the device: [DEC] and the prompt's pieces, no [SEP]."""
        longest = self.model.config.text.max_positions
        ids, _ = self.tokenizer.encode([prompt], max_length=longest, max_words=None)
        # Decoding would feed [DEC] whatever stands here; the repetition penalty is of what is fed.
        ids[0, 0] = self.tokenizer.dec_id
        return ids[0, :-1].to(self.device)

    def texts(self, prompt: Tensor, decoded: Decoded) -> list[Caption]:
        """The captions of decoded rows."""
        lead = self.tokenizer.decode(prompt)
        tokens, logprobs = decoded.tokens.cpu(), decoded.logprob.tolist()
        captions = []
        for row, logprob in zip(tokens, logprobs, strict=True):
            # Decoded with the prompt: a piece that continues the prompt's last word is not a word of its own.
            text = self.tokenizer.decode(torch.cat([prompt.cpu(), row])).removeprefix(lead).strip()
            captions.append(Caption(text if math.isfinite(logprob) else "", logprob))
        return captions


def _check(
    method: str,
    top_p: float,
    num_beams: int,
    max_new_tokens: int,
    min_new_tokens: int,
    samples: int,
    top_k: int,
) -> None:
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: it must be 0 (off) or more")
    counts = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
    }
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise UserError(
            f"min_new_tokens is {min_new_tokens}: it must be between 0 and max_new_tokens {max_new_tokens}"
        )
    if method == "greedy" and samples > 1:
        raise UserError(
            f"samples is {samples}: greedy decoding writes one caption per image; use method 'nucleus'"
        )
    if method == "beam" and samples > num_beams:
        raise UserError(
            f"samples is {samples}: beam search keeps at most num_beams {num_beams} texts per image"
        )
