"""A checkpoint of any layout written in any layout: what `capfilt export` does.

The layouts themselves are behind `layouts.home`; capfilt's own is `checkpoint`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.models import checkpoint, kind_of, layouts
from capfilt.models.common.config import Shape
from capfilt.models.common.layouts.contents import LEFTOVERS, Contents, NoHome, reason, write_leftovers
from capfilt.models.layouts import CAPFILT


def export(source: str | Path, to: str, out: str | Path, only: str = "", image_size: int = 0) -> list[str]:
    """Writes the checkpoint at `source` into the new directory `out` in the layout `to`; returns lines to print.

    only: "captioner" or "filter" takes that half of a model of both. image_size: other than 0 resizes the position
    embedding. Raises UserError where `out` exists, the source cannot be read, or something in it has no home in that
    layout; `out` is then not made.
    """
    out = Path(out)
    if to not in layouts.names():
        raise UserError(f"--to {to!r}: choose one of {', '.join(layouts.names())}")
    if only not in ("", "captioner", "filter"):
        raise UserError(f"--only {only!r}: choose captioner or filter")
    if out.exists():
        raise UserError(f"{out}: exists already; name a new directory")
    contents, _ = checkpoint.open_any(source, image_size)
    if only:
        halved = getattr(contents.model, "halved", None)
        if halved is None:
            raise UserError(f"{source}: {kind_of(contents.model).what}; it has no {only} inside")
        contents = replace(contents, model=halved(only))
        if only == "captioner":
            # They belong to ITC, which a captioner does not have.
            contents.leftovers = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".partial-") as name:
        made = Path(name) / "made"
        made.mkdir()
        try:
            place = write(made, to, contents)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        made.rename(out)
    half = getattr(contents.model.config, "half", kind_of(contents.model).name.removeprefix("blip_"))
    what = "captioner and filter" if half == "both" else half
    kept = Counter(str(reason(name)) for name in contents.leftovers)
    return [
        f"wrote {out}: {what}, layout {to}",
        *(f"  {count} tensors kept in {place}: {why}" for why, count in sorted(kept.items())),
    ]


def write(directory: Path, to: str, contents: Contents) -> str:
    """Writes the contents in the layout `to` into an empty directory; returns the name of the file with the leftovers."""
    if to != CAPFILT:
        layout = layouts.home(to, contents.model.config)
        layout.write(directory, contents, layouts.remember(contents.model, contents.tokenizer))
        return layout.weights if layout.pickled else LEFTOVERS
    if contents.leftovers:
        write_leftovers(directory, contents.leftovers)
    checkpoint.save(directory, contents.model, contents.tokenizer, contents.extra)
    return LEFTOVERS


def places(config: Shape, tokenizer: Any = None) -> dict[str, NoHome | None]:
    """The layouts of others that have a class for models of this config, each with why they have no place for it; None where
    they have one.

    Without its tokenizer, which may still have to be learned, it is judged by the size of the vocabulary.
    """
    found: dict[str, NoHome | None] = {}
    for layout in layouts.foreign():
        if type(config) in layout.models:
            try:
                layout.refusals(config, tokenizer)
                found[layout.name] = None
            except NoHome as error:
                found[layout.name] = error
    return found


def homes(name: str, found: Mapping[str, NoHome | None]) -> list[str]:
    """`places` in one line, for the checkpoint at `name`; none where no other project has a class for its model."""
    open_ = [layout for layout, error in found.items() if error is None]
    if open_:
        return [
            f"can go to {', '.join(open_)}: capfilt export {name} --to {open_[0]} --out {Path(name).name}-{open_[0]}"
        ]
    # One is enough to tell, and best one that an option would have opened.
    closed = sorted(
        ((layout, error) for layout, error in found.items() if error), key=lambda each: not each[1].cure
    )
    return [
        f"cannot go to {layout}: {error}"
        + (f"; {error.cure} in its first training allows it" if error.cure else "")
        for layout, error in closed[:1]
    ]
