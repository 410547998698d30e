"""Tars in WebDataset's layout: members that share a name up to its first dot are a sample. Nothing is extracted."""

from __future__ import annotations

import json
import lzma
import tarfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from capfilt.data.images import HEAD_BYTES, SUFFIXES, kind_of
from capfilt.formats import Reading
from capfilt.formats.files import MAX_FILE_BYTES, MAX_TEXT_BYTES, kind_in_words
from capfilt.formats.places import Place
from capfilt.formats.source import FileSource, Found, Given, SourceRow, described, further_columns
from capfilt.formats.values import caption_columns, decoded, storable

ENDINGS = (".tar", ".tgz")

REST = "#rest"
"""The key of what is missing of a tar that breaks off."""

_ROOM = 2**30
"""Contents of a tar above this, and above four times its size, are not read: little compressed may be very much."""


def detect(given: Given) -> bool:
    """Whether there are tars."""
    return bool(given.shards(*ENDINGS))


def read(given: Given, reading: Reading) -> TarSource:
    """A shard per tar, a row per sample: a picture, `.txt` (one text) or `.json` (fields)."""
    return TarSource(given, reading)


@dataclass
class Sample:
    """Members of a tar that share a key: ending -> bytes, and for those that are not whole (failure, words)."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def picture(self) -> str | None:
        """The ending of the picture: a usual one, else that of the first member that begins like a picture."""
        plain = (ending for ending in self.members if "." not in ending and kind_of(self.members[ending]))
        return next((suffix for suffix in SUFFIXES if suffix in self.members), next(plain, None))

    def apart(self) -> list[Sample]:
        """The sample; where only longer endings are pictures (`photo.1.jpg`), a sample for each name up to its last dot."""
        stems = dict.fromkeys(
            stem
            for ending, data in self.members.items()
            for stem, _, last in [ending.rpartition(".")]
            if stem and (last.lower() in SUFFIXES or kind_of(data))
        )
        if self.picture is not None or not stems:
            return [self]
        return [
            Sample(f"{self.key}.{stem}", _of(self.members, stem), _of(self.faults, stem)) for stem in stems
        ]

    def onto(self, row: SourceRow) -> SourceRow:
        """`row` with the picture of this sample, or with the failure to have one."""
        if self.picture is None:
            nothing = ("file_missing", "the tar has no picture under this key")
            return row.failed(*next(iter(self.faults.values()), nothing))
        if self.picture in self.faults:
            return row.failed(*self.faults[self.picture])
        return replace(row, picture=self.members[self.picture])


def _of(members: dict[str, Any], stem: str) -> dict[str, Any]:
    """The members whose endings begin with a stem, by what follows it, and those of all stems."""
    return {ending: value for ending, value in members.items() if "." not in ending} | {
        ending[len(stem) + 1 :]: value for ending, value in members.items() if ending.startswith(f"{stem}.")
    }


class _Forward:
    """A stream that tarfile can take for a file, since it goes forward only; remembers the block it read last."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._place = 0
        self.last = b""

    def tell(self) -> int:
        return self._place

    def seek(self, place: int) -> None:
        if self._stream.seekable():
            self._place = self._stream.seek(place)
        while self._place < place and self.read(min(place - self._place, 1 << 20)):
            pass

    def read(self, size: int) -> bytes:
        self.last = self._stream.read(size)
        self._place += len(self.last)
        return self.last


def read_tar(path: Path, *, contents: bool = True) -> tuple[list[Sample], Counter[str]]:
    """The samples of a tar, compressed or not, in order of their first members, and the members left out, by kind.

    Members of a key need not stand side by side. Of two members of one name the later counts, as it would when extracting.
    Where the archive breaks off or lacks its end mark, a last sample with the key REST stands for what followed. Without
    `contents` members are cut to their first bytes.
    """
    samples: dict[str, Sample] = {}
    left_out = Counter[str]()
    room = _ROOM + 4 * path.stat().st_size
    try:
        with Place(str(path)).stream() as stream:
            file = _Forward(stream)
            with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    if not member.isreg():
                        kind = "links" if member.issym() or member.islnk() else "special files"
                        left_out[kind] += not member.isdir()
                        continue
                    if name.startswith("."):
                        left_out["hidden"] += 1
                        continue
                    stem, _, ending = name.partition(".")
                    key = storable(f"{folder}/{stem}" if folder else stem)
                    sample = samples.setdefault(key, Sample(key))
                    ending = storable(ending.lower())
                    sample.members[ending] = b""
                    shown = f"{path.name} breaks off in {storable(member.name)}"
                    sample.faults[ending] = ("truncated", shown)
                    body = tar.extractfile(member)
                    assert body is not None
                    sample.members[ending] = body.read(HEAD_BYTES)
                    most = min(MAX_FILE_BYTES, room)
                    if member.size > most:
                        words = f"{storable(member.name)}: {member.size} bytes, more than {most}"
                        sample.faults[ending] = ("too_large", words)
                        continue
                    if contents:
                        sample.members[ending] += body.read()
                        room -= member.size
                    del sample.faults[ending]
            if file.last != bytes(tarfile.BLOCKSIZE):
                # tarfile takes a cut header, or the end of the file, for the end of the archive.
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException) as error:
        words = f"{path.name} breaks off after {len(samples)} samples ({error}): what followed is not here"
        samples[REST] = Sample(REST, faults={"": ("truncated", words)})
    apart = [each for sample in samples.values() for each in sample.apart()]
    for sample in apart:
        used = (sample.picture, "txt", "json")
        left_out.update(kind_in_words(f"_.{ending}") for ending in sample.members if ending not in used)
    return apart, +left_out


class TarSource(FileSource):
    """Samples have keys of their tar, which begin anew in the next one."""

    endings = ENDINGS

    def _count(self, file: Path) -> int:
        return len(read_tar(file, contents=False)[0])

    def _read(self, file: Path) -> Found:
        samples, left_out = read_tar(file)
        rows = [self._row(self.keys.of(self.names[file], each.key), each) for each in samples]
        # Each sample brings its own JSON: no type but text holds for all of them.
        types = dict.fromkeys(self.reading.save_additional_columns, pa.string())
        return Found(rows, left_out, further_columns(rows, types))

    def _row(self, key: str, sample: Sample) -> SourceRow:
        record, broken = _fields(sample)
        text = None if "txt" in sample.faults else sample.members.get("txt")
        columns = caption_columns(list(record), self.reading.caption_col)
        row = described(key, record, columns, self.reading.save_additional_columns)
        if text is not None and self.reading.caption_col != ("",):
            row = replace(row, captions=(decoded(text),))
        elif broken:
            return row.failed("decode_error", f"its .json is broken ({broken}), so its text is unknown")
        return sample.onto(row)


def _fields(sample: Sample) -> tuple[dict[str, Any], str]:
    data = sample.members.get("json")
    if data is None or "json" in sample.faults:
        return {}, ""
    try:
        record = json.loads(data[:MAX_TEXT_BYTES])
    except (ValueError, RecursionError) as error:
        return {}, str(error)
    return (record, "") if isinstance(record, dict) else ({}, "not an object")
