"""Which layout a path is in, and the one door to the foreign ones: `Captioner.load` and the stages come through here.

A hub id is looked up in the local cache of huggingface_hub only: a mistyped path must not reach the network.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capfilt.data.cleaning import BLIP, CLEANINGS, CLIP, CLIP_UNREPAIRED
from capfilt.data.tokenizer import Encodes
from capfilt.errors import MissingInput, UserError
from capfilt.models import Model, families, kind_of
from capfilt.models.common.config import Shape
from capfilt.models.common.layouts.contents import SETTINGS, Contents, NoHome
from capfilt.models.common.layouts.engine import CONFIG, Layout, folder
from capfilt.models.common.layouts.tensors import read_tensors
from capfilt.models.common.weights import read_json
from capfilt.models.family import found as imported
from capfilt.tables.ids import file_sha256

CAPFILT = "capfilt"
_PICKLED = (".pth", ".pt")
"""Suffixes of a file that a directory may be named for."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OURS = {"config", "files", "capfilt_version"}


def foreign() -> tuple[Layout, ...]:
    """Every layout of every family of models."""
    return tuple(layout for family in families() if family.layouts for layout in imported(family.layouts))


def names() -> tuple[str, ...]:
    """What the layouts are called, capfilt's own first."""
    return (CAPFILT, *dict.fromkeys(layout.name for layout in foreign()))


def locate(path: str | Path) -> tuple[Layout | None, Path]:
    """(layout, the directory or file to read) of a path or of a hub id in the local cache; no layout is capfilt's own.

    Whatever is not recognised is called capfilt's, whose reader says what is wrong with it.
    """
    path = Path(path)
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        found_in_cache = _cached(str(path))
        if found_in_cache is None:
            raise MissingInput(
                f"{path}: no such checkpoint; run the step that makes it, or if it is a hub id, fetch it with "
                f"`hf download {path} --local-dir DIR` and give DIR"
            )
        path = found_in_cache
    if path.is_file():
        return _layout_of_file(path), path
    content = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    if content is not None and _OURS & set(content):
        return None, path
    for layout in foreign():
        place = layout.find(path, content)
        if place is not None:
            return layout, place
    found = sorted(each for suffix in _PICKLED for each in path.glob(f"*{suffix}"))
    if content is not None or not found:
        return None, path
    if len(found) > 1:
        raise UserError(
            f"{path}: {len(found)} files that may be the checkpoint; name one, such as {found[0]}"
        )
    return _layout_of_file(found[0]), found[0]


def _layout_of_file(path: Path) -> Layout:
    known = [layout for layout in foreign() if path.suffix in layout.suffixes]
    if not known:
        suffixes = dict.fromkeys(suffix for layout in foreign() for suffix in layout.suffixes)
        raise UserError(
            f"{path}: a file, but none of {', '.join(suffixes)}; give the directory of a checkpoint, a .pth of the "
            "original repository, or a CLIP's tensors as open_clip has them"
        )
    if len(known) > 1:
        found = read_tensors(path, mapped=True)
        return next((layout for layout in known if layout.holds and layout.holds(found)), known[0])
    return known[0]


def read(layout: Layout, place: Path, image_size: int = 0) -> Contents:
    """The checkpoint at a place that `locate` found in this layout."""
    with _in_words(place):
        contents = layout.read(place, image_size)
    name = read_cleaning(folder(place))
    contents.tokenizer = contents.tokenizer.cleaned_as(cleaning_of(contents.model, contents.extra, name))
    return contents


def read_config(layout: Layout, place: Path) -> tuple[Shape, dict[str, Any]]:
    """(config, extra) of the same, no weights loaded."""
    with _in_words(place):
        return layout.read_config(place)


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn what is raised by a setting of an unexpected kind, as a list for a number, into a UserError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"{path}: its settings are not of the form that this layout has ({reason}); take it from its source again"
        ) from error


def fingerprint(layout: Layout, place: Path) -> str:
    """sha256 (hex) over the contents and relative names of every file that `read` reads."""
    total = hashlib.sha256()
    for each in layout.read_files(place):
        if not each.is_file():
            raise UserError(f"{each}: no such file")
        # The name of such a file is its owner's choice and says nothing about what is in it.
        name = each.relative_to(folder(place)).as_posix() if each != place else layout.weights
        total.update(f"{name}:{file_sha256(each)}\n".encode())
    return total.hexdigest()


def home(name: str, config: Shape) -> Layout:
    """The layout of this name that has a class for models of this config. NoHome where there is none."""
    for layout in foreign():
        if layout.name == name and type(config) in layout.models:
            return layout
    kind = kind_of(config)
    raise NoHome(
        f"{kind.one} ({kind.model.__name__}) has no home in the layout {name}, which has no class for it"
    )


def remember(model: Model, tokenizer: Encodes) -> dict[str, str]:
    """The fields by which a checkpoint tells how its texts are cleaned: none where there has been but one way."""
    kind = kind_of(model)
    return {} if kind.cleaning == BLIP or not kind.tokenizer_name else {"cleaning": tokenizer.cleaning}


def read_cleaning(directory: Path) -> str | None:
    """How texts are to be cleaned, as capfilt.json says; None where it does not, or is not there."""
    path = directory / SETTINGS
    return remembered(path, read_json(path)) if path.is_file() else None


def remembered(path: Path, content: Mapping[str, Any]) -> str | None:
    """The `cleaning` that a file's content names, None where it names none; UserError for one that is unknown here."""
    name = content.get("cleaning")
    if name is None or (isinstance(name, str) and name in CLEANINGS):
        return name
    raise UserError(f"{path}: cleaning {name!r} is unknown: {', '.join(CLEANINGS)} are known")


def cleaning_of(model: Model, extra: Mapping[str, Any], name: str | None) -> str:
    """How texts are cleaned for a checkpoint that remembers `name`.

    One from before it was remembered is cleaned as its family's released code does, or if capfilt trained it (`extra` has the
    stage), as capfilt did then: all families' texts by BLIP's rule, CLIP's unrepaired.
    """
    kind = kind_of(model)
    if name is not None or "stage" not in extra:
        return name or kind.cleaning
    return CLIP_UNREPAIRED if kind.cleaning == CLIP else BLIP


def _cached(hub_id: str) -> Path | None:
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(hub_id, local_files_only=True))
    except ImportError:
        return None
    except Exception:  # noqa: BLE001  # its errors differ from release to release; all of them mean "not here"
        return None
