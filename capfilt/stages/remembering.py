"""Gives the frozen encoders of a model a memory in the workspace.

Not here: how features are looked up (`capfilt.models.common.memo`), and how they are kept (`capfilt.tables.features`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from capfilt.models.common.memo import Memo, digest
from capfilt.tables import features
from capfilt.tables.workspace import Workspace


@contextlib.contextmanager
def remembering(model: Any, workspace: Workspace, pictures: bool = True) -> Iterator[None]:
    """Within it, encoders that have a `memo` look up what they saw before, and keep what is new in `features/`.

    pictures: whether those of pictures do too, which pay nothing where every epoch crops anew.
    """
    memos = []
    for module in model.modules() if hasattr(model, "modules") else ():
        if getattr(module, "encoder_name", "") and (pictures or not hasattr(module, "trunk_features")):
            name = f"{module.encoder_name}-{digest(module)}"
            memo = Memo(features.kept(workspace, name), partial(features.keep, workspace, name))
            module.memo = memo
            memos.append((module, memo))
    try:
        yield
    finally:
        for module, memo in memos:
            module.memo = None
            memo.flush()
