"""One engine for checkpoints in other projects' layouts: a `Layout` is data, and this reads and writes what it describes.

A layout has a name (`--to`), the classes of configs with those of their models, and
    found by   `model_type` in a directory's config.json; or a file's `suffixes`, or its `files` in a directory, and `holds`,
               which looks at the names of its tensors
    names      a function of the config that gives the table of names (`names.py`)
    shape      (path, content of the config, tensors, settings) -> (class of config, its fields by dotted name)
    said       (config, tokenizer) -> the JSON files to write, config.json among them
    vocabulary where the tokenizer lies, how it is read and written
    no_home    fields of our config that go into capfilt.json; `beside`: tensors that go into leftovers.safetensors
    refusals   (config, tokenizer), which raises NoHome where the layout has no place for a model
`ConfigTable` is the table of a config.json's fields, for `shape` and `said`; `Sizes` reads the same off tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.common.config import Shape
from capfilt.models.common.layouts.contents import (
    SETTINGS,
    Contents,
    NoHome,
    assemble,
    beside,
    blank,
    flatten,
    read_leftovers,
    read_settings,
    shaped,
    write_beside,
    write_json,
)
from capfilt.models.common.layouts.names import GEOMETRY, Rows, give, take
from capfilt.models.common.layouts.tensors import WEIGHTS, read_tensors, weights_files
from capfilt.models.common.vision import resize_position_embedding
from capfilt.models.common.weights import listed, read_json, write_safetensors

CONFIG = "config.json"
POSITIONS = "visual_encoder.pos_embed"
Found = tuple[type[Shape], dict[str, Any]]
"""The class of a config, and its fields by dotted name."""


@dataclass(frozen=True)
class Vocabulary:
    """How a tokenizer travels: `find(directory)` its one file, `read(directory, vocab_size)`, `write(directory, tokenizer)`."""

    find: Callable[[Path], Path]
    read: Callable[[Path, int], Any]
    write: Callable[[Path, Any], None]


@dataclass(frozen=True)
class Layout:
    """See the module's docstring.

    Attributes:
        who: what the layout holds, for messages: "no CLIP has ...".
        config: name of the file that `shape` reads; "" for none. Directories have one; files may have one beside them.
        weights: name of the file of tensors that is written.
        resizes: whether a file's position embedding may have another grid than the config's.
    """

    name: str
    who: str
    models: Mapping[type[Shape], type[nn.Module]]
    names: Callable[[Any], Rows]
    shape: Callable[[Path, Any, Mapping[str, Tensor] | None, dict[str, Any]], Found]
    said: Callable[[Any, Any], Mapping[str, Mapping[str, Any]]]
    vocabulary: Vocabulary
    no_home: tuple[str, ...]
    refusals: Callable[[Any, Any], None]
    beside: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    config: str = CONFIG
    weights: str = WEIGHTS
    resizes: bool = False
    model_type: str = ""
    suffixes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    holds: Callable[[Mapping[str, Tensor]], bool] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def pickled(self) -> bool:
        """Whether tensors are written by torch, leftovers among them."""
        return Path(self.weights).suffix != ".safetensors"

    def find(self, directory: Path, content: Mapping[str, Any] | None) -> Path | None:
        """What to read in a directory that is surely in this layout, None in others. content: its config.json's."""
        if content is not None:
            return directory if self.model_type and content.get("model_type") == self.model_type else None
        found = [directory / name for name in self.files if (directory / name).is_file()]
        if not found and self.suffixes and self.config and (directory / self.config).is_file():
            found = sorted(each for suffix in self.suffixes for each in directory.glob(f"*{suffix}"))
        return found[0] if found else None

    def read_files(self, place: Path) -> list[Path]:
        """Every file that `read` reads."""
        directory = folder(place)
        config = [directory / self.config] if self.config else []
        held = [*weights_files(place), self.vocabulary.find(directory)]
        if place == directory:
            held = [*config, *held]
        else:
            held += [each for each in config if each.is_file()]
        return [*held, *beside(directory)]

    def read_config(self, place: Path) -> tuple[Shape, dict[str, Any]]:
        """(our config, `extra`) of the checkpoint: of a directory no weights are read, of a file only their sizes."""
        return self.told(place, read_tensors(place, mapped=True) if self.suffixes else None)

    def told(self, place: Path, found: Mapping[str, Tensor] | None) -> tuple[Shape, dict[str, Any]]:
        """The same, given the tensors."""
        directory, path = folder(place), place
        if self.holds is not None and found is not None and not self.holds(found):
            raise UserError(
                f"{place}: no {self.who} in the layout {self.name}: it holds {listed(sorted(found))}"
            )
        content: dict[str, Any] | None = None
        if self.config and (place == directory or (directory / self.config).is_file()):
            content = read_json(directory / self.config)
            path = directory / self.config if place == directory else place
        settings, extra = read_settings(directory)
        stray = sorted(set(settings) - set(self.no_home))
        if stray:
            raise UserError(
                f"{directory / SETTINGS}: fields {listed(stray)} are decided by the checkpoint itself; remove them there"
            )
        kind, values = self.shape(path, content, found, settings)
        config = shaped(path, kind, values)
        return shaped(directory / SETTINGS, kind, {**flatten(config.to_dict()), **settings}), extra

    def read(self, place: Path, image_size: int = 0) -> Contents:
        """The checkpoint; `image_size` other than 0 resizes the position embedding. UserError names the file or key."""
        directory, path = folder(place), weights_files(place)[0]
        found = read_tensors(place)
        config, extra = self.told(place, found)
        if image_size and self.resizes:
            sized = {**flatten(config.to_dict()), "vision.image_size": image_size}
            config = shaped(path, type(config), sized)
        leftovers = read_leftovers(directory, tuple(name for name, _ in self.beside.values()))
        deepest = max(value for name, value in flatten(config.to_dict()).items() if name.endswith("depth"))
        if deepest > len(found):
            raise UserError(f"{path}: {len(found)} tensors are no {self.who} of {deepest} layers")
        model = self.blank(config)
        state, rest = self.taken(path, model, found)
        for ours, (name, value) in self.beside.items():
            kept = leftovers.pop(name, torch.tensor(value))
            if ours in model.state_dict():
                state[ours] = kept
        if self.resizes:
            try:
                state[POSITIONS] = resize_position_embedding(state[POSITIONS], config.vision.grid)
            except (UserError, RuntimeError) as error:
                raise UserError(f"{path}: {POSITIONS}: {error}".splitlines()[0]) from error
        assemble(path, model, state)
        tokenizer = self.vocabulary.read(directory, config.vocab_size)
        if image_size and image_size != model.config.image_size:
            model.resize_image(image_size)
        return Contents(model, tokenizer, extra, {**rest, **leftovers})

    def taken(
        self, path: Path, model: Any, found: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(tensors of a blank model but those of `beside`, leftovers under their names), as `names.take`."""
        known = {name: each for name, each in found.items() if name not in self.ignored}
        return take(path, self.who, self.names(model.config), self._homed(model), known)

    def given(self, config: Shape, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a model of `config` among `own` under their names."""
        names = self._homed(self.blank(config))
        return give(self.names(config), {name: own[name] for name in names})

    def blank(self, config: Shape) -> Any:
        """The model of this config, without values."""
        return blank(self.models[type(config)], config)

    def _homed(self, model: Any) -> dict[str, Tensor]:
        return {name: each for name, each in model.state_dict().items() if name not in self.beside}

    def write(self, directory: Path, contents: Contents, cleaning: Mapping[str, str]) -> None:
        """Writes the checkpoint into an empty directory; NoHome, before anything is written, where it has no home.

        cleaning: fields on how texts are cleaned, for capfilt.json.
        """
        model, config, tokenizer = contents.model, contents.model.config, contents.tokenizer
        self.refusals(config, tokenizer)
        own = {name: each.detach().cpu() for name, each in model.state_dict().items()}
        weights = {name: each.contiguous() for name, each in self.given(config, own).items()}
        rest = {name: own[ours] for ours, (name, _) in self.beside.items() if ours in own}
        if self.pickled:
            torch.save({"model": {**weights, **contents.leftovers}}, directory / self.weights)
        else:
            write_safetensors(
                directory / self.weights, {name: each.clone() for name, each in weights.items()}
            )
            rest |= contents.leftovers
        self.vocabulary.write(directory, tokenizer)
        for name, content in self.said(config, tokenizer).items():
            write_json(directory / name, content)
        fields = flatten(config.to_dict()).items()
        settings = {name: value for name, value in fields if name in self.no_home}
        write_beside(directory, settings, contents.extra, rest, cleaning)


def folder(place: Path) -> Path:
    """The directory of a checkpoint that is one, or one file of it."""
    return place if place.is_dir() else place.parent


# ---------------------------------------------------------------------- config.json as a table


@dataclass(frozen=True)
class ConfigTable:
    """What transformers says of a model in its config.json.

    Attributes:
        classes: by the name in `architectures`, the class of our config and the fields that it implies.
        fields: (ours, theirs, what theirs means where it is left out), by dotted name.
        fixed: by their name the values it may have; the first is what leaving it out means, the last is written.
        unsaid: by their name the one value it may have, which is not written.
    """

    who: str
    classes: Mapping[str, tuple[type[Shape], Mapping[str, Any]]]
    fields: tuple[tuple[str, str, Any], ...]
    fixed: Mapping[str, tuple[Any, ...]]
    unsaid: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, path: Path, content: Mapping[str, Any]) -> tuple[str, type[Shape], dict[str, Any]]:
        """(the architecture, class of our config, its fields); UserError for what none of our models has."""
        for table in {theirs.partition(".")[0] for _, theirs, _ in self.fields if "." in theirs}:
            if not isinstance(content.get(table) or {}, dict):
                raise UserError(f"{path}: {table} is {content[table]!r}, not a table of fields")
        named = content.get("architectures")
        known = [each for each in named if isinstance(each, str)] if isinstance(named, list) else []
        kind = next((each for each in known if each in self.classes), None)
        if kind is None and len(self.classes) > 1:
            raise UserError(f"{path}: architectures {named!r} is none of {', '.join(self.classes)}")
        kind = kind or next(iter(self.classes))
        wrong = [
            f"{name} {value!r} (only {values[-1]!r})"
            for name, values in {
                **self.fixed,
                **{each: (only,) for each, only in self.unsaid.items()},
            }.items()
            if (value := _said(content, name, values[0])) not in values
        ]
        if wrong:
            raise UserError(f"{path}: capfilt's {self.who} has no {listed(wrong)}")
        shape, implied = self.classes[kind]
        own = flatten(shape().to_dict())
        values = {ours: _side(_said(content, theirs, default)) for ours, theirs, default in self.fields}
        return kind, shape, {**{name: each for name, each in values.items() if name in own}, **implied}

    def write(self, config: Shape) -> dict[str, Any]:
        """What a config.json says of the config, by dotted name."""
        own = flatten(config.to_dict())
        said = {theirs: own.get(ours, default) for ours, theirs, default in self.fields}
        return {**said, **{name: values[-1] for name, values in self.fixed.items()}}


def _said(content: Mapping[str, Any], name: str, default: Any) -> Any:
    table, dot, leaf = name.rpartition(".")
    value = ((content.get(table) or {}) if dot else content).get(leaf)
    return default if value is None else value


def _side(value: Any) -> Any:
    """The side of a square that is written as a pair."""
    return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


def geometry(ours: str, theirs: str, *defaults: int) -> tuple[tuple[str, str, int], ...]:
    """Fields of a transformer, their names after these prefixes; defaults: width, depth, heads, hidden width."""
    fields = zip(("width", "depth", "heads", "hidden"), GEOMETRY, defaults, strict=True)
    return tuple((ours + own, theirs + name, default) for own, name, default in fields)


def pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """What every `preprocessor_config.json` of transformers says."""
    return {
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [*mean], "image_std": [*std],
    }  # fmt: skip


def refuse_trunk(config: Shape, layout: str) -> None:
    """NoHome where pictures are seen through a pretrained trunk, which has no home in `layout`."""
    if config.vision.trunk:
        raise NoHome(
            f"vision.trunk {config.vision.trunk!r} has no home in {layout}, whose tower is a ViT",
            "a --preset other than trunk",
        )
    if sentence := getattr(config, "sentence", ""):
        raise NoHome(
            f"sentence {sentence!r} has no home in {layout}, whose text side has one encoder",
            "a --preset other than trunk",
        )


def refuse_convolutions(config: Shape, layout: str) -> None:
    """NoHome where the vision tower is none of the published ViTs, which alone have a home in `layout`."""
    refuse_trunk(config, layout)
    if config.vision.stem != "patch":
        raise NoHome(
            f"vision.stem {config.vision.stem!r} has no home in {layout}: only 'patch' has", "--stem patch"
        )


# ---------------------------------------------------------------------- sizes read off tensors


@dataclass(frozen=True)
class Sizes:
    """The tensors of a file that holds no geometry."""

    path: Path
    found: Mapping[str, Tensor]

    def size(self, name: str, dimension: int) -> int:
        """Of a tensor; UserError where it is missing, or has fewer dimensions."""
        if name not in self.found or self.found[name].dim() <= dimension:
            raise UserError(
                f"{self.path}: no {name} of {dimension + 1} dimensions, from which the model's sizes are read"
            )
        return int(self.found[name].shape[dimension])

    def table(self, sizes: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
        """The sizes that fields of a config have."""
        return {ours: self.size(name, dimension) for ours, (name, dimension) in sizes.items()}

    def count(self, prefix: str) -> int:
        """How many numbered modules follow the prefix."""
        return len(
            {name.removeprefix(prefix).partition(".")[0] for name in self.found if name.startswith(prefix)}
        )

    def any(self, *prefixes: str) -> bool:
        """Whether some tensor's name begins with one of these."""
        return any(name.startswith(prefixes) for name in self.found)

    def grid(self, name: str, dimension: int) -> int:
        """Positions per side, besides [CLS]'s."""
        rows = self.size(name, dimension) - 1
        side: int = round(rows**0.5)
        if side * side != rows:
            raise UserError(f"{self.path}: {name} has {rows} rows besides [CLS], which is no square grid")
        return side

    def heads(self, width: int, channels: int, most: int, cure: str) -> int:
        """How many heads of `channels` make `width`; UserError where that is not sure, which says how to tell."""
        if width % channels or width > most:
            raise UserError(f"{self.path}: a width of {width} does not say the number of heads; put {cure}")
        return width // channels
