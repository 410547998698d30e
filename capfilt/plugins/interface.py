"""What `caption` and `score` ask of whatever writes and scores texts. BLIP checkpoints answer it, and so do plug-ins.

A plug-in knows nothing of tables: pictures and texts come in, texts or numbers go out. Which rows they belong to is the
stages' business; how one is found by its name is `registry.py`'s. A guide is in `docs/plugins.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class Plugin(Protocol):
    """What both kinds have in common.

    It is made cheaply, from the argument after `NAME:`, in the process that plans a run and again in every worker;
    weights are loaded by `setup`, in workers alone.
    """

    def fingerprint(self) -> str:
        """Changes with whatever the answers depend on: version of the code, digest of the weights. Never empty."""

    def setup(self) -> None:
        """Load what the answers need; called once in each worker, before anything below."""

    def prepare(self, data: bytes) -> Any:
        """One encoded picture in the form this plug-in wants it, called from several threads at once.

        `capfilt.data.transforms.decode_uint8(data, size)` gives uint8 [3, size, size], `capfilt.data.images.decode`
        an RGB picture at its own size, both within capfilt's limits; `data` itself may be returned. Raise
        `capfilt.data.images.BadImage` for a picture that cannot be used: it becomes a row with that failure.
        """


@runtime_checkable
class FindsBatchSize(Protocol):
    """A plug-in that knows how many pictures it can take at a time. Others are given 64 where nobody says."""

    def batch_size(self, asked: int, ways: int) -> int:
        """Pictures at a time, at least 1, once `setup` was called: `asked`, its own choice where that is 0, fewer where memory
        turned out not to hold so many. A part's first worker chooses for all of its shards; the others are asked for that.

        ways: texts that are written per picture at the same time; 1 for a scorer.
        """


@runtime_checkable
class Gathers(Protocol):
    """A plug-in that wants a batch's pictures in one piece; others are given a list of them."""

    def gather(self, images: list[Any]) -> Any:
        """All that `prepare` returned for a batch, at least one, in the form that `caption` or `score` takes; called in a
        thread while the batch before is worked on.
        """


@runtime_checkable
class TellsHow(Protocol):
    """A plug-in whose answers depend on the machine in other ways than by chance."""

    def computed(self) -> Mapping[str, str]:
        """How answers come about here, once `setup` was called: at least `precision`, which all shards of a part must have in
        common. The shard's stats tell it all.
        """


class CaptionerPlugin(Plugin, Protocol):
    """Writes texts for pictures."""

    def caption(
        self,
        images: Any,
        keys: Sequence[str],
        *,
        samples: int,
        seed: int,
        method: str,
        top_p: float,
        top_k: int,
        temperature: float,
        num_beams: int,
        length_penalty: float,
        beam_rule: str,
        prompt: str,
        max_new_tokens: int,
        min_new_tokens: int,
        repetition_penalty: float,
        batch_size: int,
    ) -> Sequence[tuple[str, float | None]]:
        """`samples` pairs (text, log-probability or None) per image, image by image. Never called without images.

        A plug-in names the options that mean something to it and takes the rest as `**rest`.

        Args:
            images: what `prepare` returned, one per picture, or what `gather` made of it.
            keys: the pictures' image_ids: text k of image i should be drawn from (seed, keys[i], k) alone, so that it
                does not depend on the batch it is in.
            samples, seed, method, ...: the options of `capfilt caption`; batch_size: pictures at a time, at least 1.
        """


class ScorerPlugin(Plugin, Protocol):
    """Gives texts numbers under pictures."""

    @property
    def columns(self) -> Mapping[str, str]:
        """The scores' names, each with what it means and its range: columns of the part, float32, in this order."""

    def score(
        self,
        images: Any,
        image_index: Sequence[int],
        texts: Sequence[str],
        *,
        max_text_tokens: int,
        batch_size: int,
    ) -> Sequence[Sequence[float]]:
        """Row j has a number per column, for texts[j] under images[image_index[j]]. Never called without texts.

        A number that is not finite becomes the failure `not_finite`. A plug-in takes options it has no use for as
        `**rest`.

        Args:
            images: what `prepare` returned, one per picture, or what `gather` made of it; one that
                nothing points at is not asked about.
            image_index: for each text, the place of its picture in `images`.
            max_text_tokens: the option of `capfilt score`; batch_size: pictures at a time, at least 1.
        """
