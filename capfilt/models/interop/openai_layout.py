"""CLIP's weights as OpenAI released them and as open_clip has them: one file of tensors, `open_clip_config.json` beside it.

The file is a dictionary of tensors (`.pt`, `.bin`, `.safetensors`), or what open_clip's training saves, with it under
`state_dict`. What is in it under which name is `clip_layouts.py`'s. Written against open_clip 3.3; nothing of it is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from capfilt.errors import UserError
from capfilt.models import kind_of
from capfilt.models.clip.model import Clip, ClipConfig
from capfilt.models.common.config import Shape
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD
from capfilt.models.common.weights import (
    archive_members,
    listed,
    read_json,
    read_pickled,
    read_safetensors,
    write_safetensors,
)
from capfilt.models.interop import clip_directory
from capfilt.models.interop.clip_layouts import OPENAI, exported, filled, from_openai_shapes, openai_cfg
from capfilt.models.interop.contents import (
    SETTINGS,
    Contents,
    NoHome,
    read_settings,
    refuse_trunk,
    remember,
    settings_of,
    unwrapped,
    with_settings,
    write_beside,
)

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
NAMES = (WEIGHTS, "open_clip_pytorch_model.bin")
"""What open_clip calls the file in a directory."""
SUFFIXES = (".safetensors", ".bin")
"""Files that are nothing else; a `.pt` is looked into."""
NO_HOME = ("max_text_tokens", "max_words")
_MARK = "token_embedding.weight"


def weights_in(directory: Path) -> Path | None:
    """The weights of a directory that open_clip reads; None where it is no such directory."""
    found = [directory / name for name in NAMES if (directory / name).is_file()]
    if not found and (directory / CONFIG).is_file():
        found = sorted(each for suffix in (*SUFFIXES, ".pt") for each in directory.glob(f"*{suffix}"))
    return found[0] if found else None


def holds(path: Path) -> bool:
    """Whether a `.pt` is a CLIP in this layout, or the archive of one."""
    try:
        return _is_archive(path) or _MARK in _state(path, mapped=True)
    except UserError:
        return False


def files(path: Path) -> list[Path]:
    """Every file that `read` reads."""
    found = [path, *clip_directory.tokenizer_files(path.parent)]
    return [*found, *(each for each in (path.parent / CONFIG, path.parent / SETTINGS) if each.is_file())]


def read_config(path: Path) -> tuple[ClipConfig, dict[str, Any]]:
    """(our config, `extra`), only the sizes of the tensors looked at."""
    return _config(path, _state(path, mapped=True))


def read(path: Path, image_size: int = 0) -> Contents:
    """The checkpoint; `image_size` other than 0 resizes the position embedding. UserError names the file or key."""
    state = _state(path)
    config, extra = _config(path, state)
    model = filled(path, config, OPENAI, state)
    tokenizer = clip_directory.tokenizer_of(path.parent, config)
    if image_size and image_size != config.image_size:
        model.resize_image(image_size)
    return Contents(model, tokenizer, extra)


def write(directory: Path, contents: Contents) -> None:
    """Writes the checkpoint into an empty directory, which open_clip opens as `local-dir:` too. UserError for no Clip."""
    model = contents.model
    refuse(model.config)
    assert isinstance(model, Clip)
    weights = {name: each.detach().cpu().clone() for name, each in exported(model, OPENAI).items()}
    write_safetensors(directory / WEIGHTS, weights)
    contents.tokenizer.save(directory)
    said = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    content = {"model_cfg": openai_cfg(model.config), "preprocess_cfg": said}
    (directory / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    said_of_texts = remember(model, contents.tokenizer)
    write_beside(
        directory, settings_of(model.config, NO_HOME), contents.extra, contents.leftovers, said_of_texts
    )


def refuse(config: Shape, tokenizer: Any = None) -> None:
    """NoHome for what is no Clip; else nothing."""
    if not isinstance(config, ClipConfig):
        raise NoHome(f"{kind_of(config).one} has no home in OpenAI's layout, which is CLIP's")
    refuse_trunk(config, "OpenAI's layout")


def _config(path: Path, state: dict[str, Tensor]) -> tuple[ClipConfig, dict[str, Any]]:
    said = None
    place = path.parent / CONFIG
    if place.is_file():
        content = read_json(place)
        said = content.get("model_cfg")
        if not isinstance(said, dict):
            raise UserError(f"{place}: the table 'model_cfg' is missing")
        shown = content.get("preprocess_cfg") or {}
        for name, ours in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            if tuple(shown.get(name) or ours) != ours:
                raise UserError(
                    f"{place}: pictures are normalised by another {name} than CLIP's {list(ours)}"
                )
    config = from_openai_shapes(path, state, said)
    settings, extra = read_settings(path.parent)
    return with_settings(path.parent / SETTINGS, config, NO_HOME, settings), extra


def _state(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return unwrapped(path, read_safetensors(path))
    if _is_archive(path):
        raise UserError(
            f"{path}: a TorchScript archive, as OpenAI's downloads are: it holds a program, which is not run. Where you "
            f"trust it, save its tensors alone: torch.save(torch.jit.load(path).state_dict(), 'clip.pt')"
        )
    found = unwrapped(path, read_pickled(path, mapped))
    if _MARK not in found:
        raise UserError(f"{path}: no CLIP in OpenAI's layout: it holds {listed(sorted(found))}")
    return found


def _is_archive(path: Path) -> bool:
    """Whether it is TorchScript: torch's own archives have no constants."""
    return any(each.filename.endswith("/constants.pkl") for each in archive_members(path))
