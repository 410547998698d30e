"""Which layout a path is in, and the one door to the foreign ones: `Captioner.load` and the stages come through here.

A hub id is looked up in the local cache of huggingface_hub only: a mistyped path must not reach the network.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capfilt.errors import MissingInput, UserError
from capfilt.models import kind_of
from capfilt.models.common.config import Shape
from capfilt.models.common.weights import read_json
from capfilt.models.interop import (
    clip_directory,
    openai_layout,
    original_layout,
    transformers_layout,
    vilt_directory,
)
from capfilt.models.interop.contents import Contents, cleaning_of, read_cleaning
from capfilt.tables.ids import file_sha256

CAPFILT, TRANSFORMERS, ORIGINAL, OPENAI = "capfilt", "transformers", "original", "openai"
LAYOUTS = (CAPFILT, TRANSFORMERS, ORIGINAL, OPENAI)
_FILES: dict[str, Any] = {ORIGINAL: original_layout, OPENAI: openai_layout}
"""Layouts whose checkpoint is one file, with others beside it: what reads and writes them."""
_DIRECTORIES: dict[str, Any] = {
    "blip": transformers_layout,
    "clip": clip_directory,
    "vilt": vilt_directory,
    "vilt_classifier": vilt_directory,
}
"""By `model_type`, transformers' and ours, what reads and writes the directory."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OURS = {"config", "files", "capfilt_version"}


def locate(path: str | Path) -> tuple[str, Path]:
    """(layout, the directory or file to read) of a path or of a hub id in the local cache.

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
    if (path / transformers_layout.CONFIG).is_file():
        content = read_json(path / transformers_layout.CONFIG)
        foreign = not _OURS & set(content) and str(content.get("model_type")) in _DIRECTORIES
        return (TRANSFORMERS if foreign else CAPFILT), path
    if transformers_layout.is_pair(path):
        return TRANSFORMERS, path
    weights = openai_layout.weights_in(path)
    if weights is not None:
        return OPENAI, weights
    found = sorted(each for suffix in original_layout.SUFFIXES for each in path.glob(f"*{suffix}"))
    if len(found) > 1:
        raise UserError(
            f"{path}: {len(found)} files that may be the checkpoint; name one, such as {found[0]}"
        )
    return (_layout_of_file(found[0]), found[0]) if found else (CAPFILT, path)


def _layout_of_file(path: Path) -> str:
    if path.suffix in openai_layout.SUFFIXES:
        return OPENAI
    if path.suffix not in original_layout.SUFFIXES:
        raise UserError(
            f"{path}: a file, but none of {', '.join((*original_layout.SUFFIXES, *openai_layout.SUFFIXES))}; give the "
            "directory of a checkpoint, a .pth of the original repository, or a CLIP's tensors as open_clip has them"
        )
    return OPENAI if openai_layout.holds(path) else ORIGINAL


def read(layout: str, path: Path, image_size: int = 0) -> Contents:
    """The checkpoint at a path that `locate` found in this foreign layout."""
    reader = _FILES[layout] if layout in _FILES else _transformers(path)
    with _in_words(path):
        contents: Contents = reader.read(path, image_size)
    name = read_cleaning(path if path.is_dir() else path.parent)
    contents.tokenizer = contents.tokenizer.cleaned_as(cleaning_of(contents.model, contents.extra, name))
    return contents


def read_config(layout: str, path: Path) -> tuple[Shape, dict[str, Any]]:
    """(config, extra) of the same, no weights loaded."""
    reader = _FILES[layout] if layout in _FILES else _transformers(path)
    with _in_words(path):
        found: tuple[Shape, dict[str, Any]] = reader.read_config(path)
    return found


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn what is raised by a setting of an unexpected kind, as a list for a number, into a UserError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"{path}: its settings are not of the form that this layout has ({reason}); take it from its source again"
        ) from error


def fingerprint(layout: str, path: Path) -> str:
    """sha256 (hex) over the contents and relative names of every file that `read` reads."""
    if layout == TRANSFORMERS:
        files, root = _transformers(path).files(path), path
    else:
        files, root = _FILES[layout].files(path), path.parent
    total = hashlib.sha256()
    for each in files:
        if not each.is_file():
            raise UserError(f"{each}: no such file")
        # The name of such a file is its owner's choice and says nothing about what is in it.
        name = each.relative_to(root).as_posix() if each != path else _FILES[layout].WEIGHTS
        total.update(f"{name}:{file_sha256(each)}\n".encode())
    return total.hexdigest()


def writer(layout: str, model: object) -> Any:
    """What writes this model in a foreign layout. A model without a home there is refused by what it writes with."""
    if layout in _FILES:
        return _FILES[layout]
    return _DIRECTORIES.get(kind_of(model).name, transformers_layout)


def _transformers(path: Path) -> Any:
    """What reads this transformers directory."""
    if transformers_layout.is_pair(path):
        return transformers_layout
    return _DIRECTORIES[str(read_json(path / transformers_layout.CONFIG)["model_type"])]


def _cached(hub_id: str) -> Path | None:
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(hub_id, local_files_only=True))
    except ImportError:
        return None
    except Exception:  # noqa: BLE001  # its errors differ from release to release; all of them mean "not here"
        return None
