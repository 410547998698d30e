"""The record of a stage: the words that call it, its options, its classes by name, its examples.

Light: nothing of a stage is imported before it runs.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capfilt.errors import UserError
from capfilt.options import missing

if TYPE_CHECKING:
    from capfilt.stages.base import ModelStage, ShardStage
    from capfilt.tables.shards import Part
    from capfilt.tables.workspace import Workspace


@dataclass(frozen=True)
class StageCommand:
    """How one stage is called: its words, the classes it runs in order, its examples."""

    words: tuple[str, ...]
    options: type
    stages: tuple[str, ...]
    examples: tuple[str, ...]
    positional: str = ""
    out: bool = False  # whether --out names a directory (the option dataclass has none of its own)
    without: str = ""  # a boolean option that, when off, leaves out all stages but the first
    instead: tuple[str, str] = ("", "")  # an option that, when set, runs this class in place of the others
    shows: str = (
        ""  # "module:function" that the command line calls with (output, options, quiet, where) at the end
    )

    @property
    def name(self) -> str:
        """The words joined by `-`, as recipes write them."""
        return "-".join(self.words)

    def classes(self, options: Any) -> tuple[str, ...]:
        """The classes to run with these options, in order."""
        option, path = self.instead
        if option and getattr(options, option):
            return (path,)
        return self.stages[:1] if self.without and not getattr(options, self.without) else self.stages

    def build(
        self, path: str, options: Any, workspace: Workspace, output: Part | None = None
    ) -> ShardStage | ModelStage:
        """An instance of the class at "module:Class".

        Raises UserError for an option that must be given and was not, and for a class that lacks a part of a stage.
        """
        open_ = missing(options)
        if open_:
            raise UserError(
                f"{self.name}: {open_[0]} must be given (see capfilt {' '.join(self.words)} --help)"
            )
        # Before the inputs are looked at: they may not be there yet when a recipe's steps are checked.
        if hasattr(options, "dataset"):
            workspace.dataset("images", options.dataset)
        if getattr(options, "out", ""):
            workspace.model(options.out)
        place = workspace.noting()
        stage: ShardStage | ModelStage = self._class(path)(options, place, output)
        wanted = ("name", "version", "output", *(("contract",) if hasattr(stage, "process") else ()))
        self._complete(path, [each for each in wanted if not hasattr(stage, each)])
        stage.gaps = place.gaps
        return stage

    def _class(self, path: str) -> Any:
        """The class at "module:Class". Raises UserError where it cannot be imported, or a method is missing."""
        from capfilt.stages.base import ModelStage, ShardStage

        try:
            kind = pkgutil.resolve_name(path)
        except (ImportError, AttributeError) as error:
            raise UserError(f"stage {self.name}: {path} cannot be imported: {error}") from error
        if not isinstance(kind, type) or not issubclass(kind, ShardStage | ModelStage):
            raise UserError(f"stage {self.name}: {path} is neither a ShardStage nor a ModelStage")
        self._complete(path, sorted(kind.__abstractmethods__))
        return kind

    def _complete(self, path: str, missing: list[str]) -> None:
        if missing:
            raise UserError(f"stage {self.name}: {path} has no {', '.join(missing)}")
