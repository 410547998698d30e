"""What the stages that measure share: a result is one JSON file in `runs/`, published once, with its identity."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import RunError, UserError
from capfilt.stages.base import ModelStage, Report
from capfilt.tables.publish import publish_new_bytes


class ResultStage(ModelStage):
    """A stage that ends in `runs/<name>.json`: {"name", "stage", "fingerprint", "identity", "origins", "metrics", ...}."""

    unit = "batches"
    output: Path

    @abstractmethod
    def measure(self, report: Report) -> dict[str, Any]:
        """The figures: "metrics" (flat, numbers) and whatever else belongs in the file."""

    def done(self) -> bool:
        if not self.output.is_file():
            return False
        if self._made().get("fingerprint") != self.fingerprint():
            raise UserError(
                f"{self.output}: holds a result of other options, inputs or checkpoint; name another output (--out NAME), or "
                "remove that file (--overwrite does)"
            )
        return True

    def standing(self) -> list[Path]:
        return [self.output] if self.output.is_file() and "fingerprint" in self._made() else []

    def _made(self) -> dict[str, Any]:
        try:
            made = json.loads(self.output.read_bytes())
        except ValueError as error:
            raise UserError(f"{self.output}: not readable as a result; remove it and run again") from error
        return made if isinstance(made, dict) else {}

    def run(self, report: Report) -> Mapping[str, Any]:
        result = {
            "name": self.output.stem,
            "stage": self.name,
            "fingerprint": self.fingerprint(),
            "identity": dict(self.identity()),
            "origins": dict(self.origins()),
            **({"incomplete_inputs": dict(self.gaps)} if self.gaps else {}),
            **self.measure(report),
        }
        try:
            text = json.dumps(result, indent=1, allow_nan=False)
        except ValueError as error:
            raise RunError(f"{self.output}: a figure is not finite, so nothing was written") from error
        self.output.parent.mkdir(parents=True, exist_ok=True)
        publish_new_bytes(self.output, (text + "\n").encode())
        counted = {"texts": result["texts"]} if "texts" in result else {}
        return {**self.headline(result["metrics"]), **counted}

    def headline(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The few figures that fit in a line."""
        return dict(metrics)
