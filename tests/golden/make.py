"""The golden numbers: `python tests/golden/make.py` compares them with what this code computes.

--write      write numbers.json anew. Read its difference before you commit it: every line is a promise broken.
--fixtures   write tests/fixtures/checkpoints-2 and workspace-2, as this code writes them. They stand for files that people
             have, so existing ones are left alone; a new layout gets a new number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from capfilt.execution.inline import InlineExecutor  # noqa: E402
from capfilt.execution.run import run_stage  # noqa: E402
from capfilt.models import checkpoint  # noqa: E402
from capfilt.tables.shards import Part  # noqa: E402
from capfilt.tables.workspace import Workspace  # noqa: E402
from tests.golden.families import MODELS, OBJECTIVES, filled, outputs, steps, tokenizer_of  # noqa: E402
from tests.golden.stages import STAGES, server, write_sources  # noqa: E402

NUMBERS = HERE / "numbers.json"
FIXTURES = HERE.parent / "fixtures"
CHECKPOINTS, WORKSPACE = FIXTURES / "checkpoints-2", FIXTURES / "workspace-2"
SAVED = (
    *("blip", "blip_vqa", "blip_nlvr", "blip_classifier", "clip", "clip_resnet", "vilt", "vilt_classifier"),
    *(
        "albef",
        "albef_vqa",
        "albef_nlvr",
        "albef_classifier",
        "blip_filter",
        "blip_pictures",
        "albef_retrieval",
        "locked",
        "locked_over",
    ),
)
"""The models of MODELS that are fixtures."""

RELATIVE, ABSOLUTE = 2e-5, 1e-5
"""How far a number may be off: other processors round otherwise."""


def sketch(tensor: Tensor) -> list[float]:
    """Seven numbers that stand for a tensor: how large it is on average, a sum that weighs each place otherwise, five of it."""
    flat = tensor.detach().double().flatten()
    waves = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    places = torch.linspace(0, len(flat) - 1, 5).long()
    return [flat.abs().mean().item(), (flat * waves).mean().item(), *flat[places].tolist()]


def losses(name: str) -> list[dict[str, float]]:
    return steps(OBJECTIVES[name])


def computed(name: str, model: Any = None) -> dict[str, Any]:
    """What the model named so computes, filled, or the `model` that was read."""
    found = outputs(name, filled(MODELS[name]()) if model is None else model)
    return {key: {"shape": list(each.shape), "values": sketch(each)} for key, each in found.items()}


def initial(name: str) -> dict[str, list[float]]:
    """The weights that the model begins with, by module."""
    found: dict[str, list[Tensor]] = {}
    for key, each in MODELS[name]().state_dict().items():
        found.setdefault(key.partition(".")[0], []).append(each.double().flatten())
    return {key: sketch(torch.cat(some))[:2] for key, some in sorted(found.items())}


def tensors(name: str) -> str:
    """A hash of the names, shapes and types of the model's tensors, which checkpoints depend on."""
    found = {key: [str(each.dtype), *each.shape] for key, each in MODELS[name]().state_dict().items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def fingerprints() -> dict[str, str]:
    """Of the parts of the workspace that is a fixture."""
    parts = {stage: part_of(stage, Workspace(WORKSPACE)) for stage in STAGES}
    return {stage: part.info["fingerprint"] for stage, part in parts.items()}


def part_of(stage: str, place: Workspace) -> Part:
    """The part in which a stage of STAGES has its rows."""
    names = {
        "ingest": ("images", "web"), "download": ("images", "downloaded"), "caption": ("captions", "blip"),
        "caption by beams": ("captions", "beams"), "score": ("scores", "blip"), "duplicates": ("signals", "duplicates"),
        "select": ("verdicts", "capfilt"), "select-pairs": ("pairs", "capfilt"), "select a share": ("verdicts", "share"),
        "subset": ("images", "noisy"), "examples": ("examples", "questions"),
    }  # fmt: skip
    return place.part(*names[stage])


def numbers() -> dict[str, Any]:
    """All of numbers.json."""
    return {
        "losses": {name: losses(name) for name in OBJECTIVES},
        "outputs": {name: computed(name) for name in MODELS},
        "initial": {name: initial(name) for name in MODELS},
        "tensors": {name: tensors(name) for name in MODELS},
        "fingerprints": fingerprints(),
    }


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NUMBERS.read_text())
    return found


def differences(found: Any, golden: Any, where: str = "") -> Iterator[str]:
    """Lines on each place where two JSON values differ, numbers by more than rounding."""
    if isinstance(found, dict) and isinstance(golden, dict):
        for key in sorted({*found, *golden}):
            yield from differences(found.get(key), golden.get(key), f"{where} {key}")
    elif isinstance(found, list) and isinstance(golden, list) and len(found) == len(golden):
        for place, (one, other) in enumerate(zip(found, golden, strict=True)):
            yield from differences(one, other, f"{where}[{place}]")
    elif isinstance(found, float) and isinstance(golden, float):
        if not math.isclose(found, golden, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{where}: {found:.7g}, was {golden:.7g}"
    elif found != golden:
        yield f"{where}: {found}, was {golden}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def write_checkpoints() -> None:
    for name in [each for each in SAVED if not (CHECKPOINTS / each).exists()]:
        model = filled(MODELS[name]())
        checkpoint.save(CHECKPOINTS / name, model, tokenizer_of(model), {"made": "for tests"})


def write_workspace() -> None:
    os.chdir(WORKSPACE.parent)  # so that no path of this machine is written down
    with tempfile.TemporaryDirectory() as scratch, server():
        place = Workspace(WORKSPACE.name)
        shutil.copytree(CHECKPOINTS / "blip", place.model("blip"))
        write_sources(Path(scratch))
        for make in STAGES.values():
            run_stage(make(place, Path(scratch)), InlineExecutor(), quiet=True)
        shutil.rmtree(place.path / "models")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--fixtures", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.fixtures:
        write_checkpoints()
        if WORKSPACE.exists():
            print(f"{WORKSPACE} stands and is left as it is")
        else:
            write_workspace()
    if given.write:
        NUMBERS.write_text(json.dumps(_rounded(numbers()), indent=1, sort_keys=True) + "\n")
    lines = list(differences(numbers(), recorded()))
    print("\n".join(lines) or "as recorded")
    sys.exit(bool(lines))
