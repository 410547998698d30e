"""Would catch: a wheel with a stray top-level package or without its recipes, the torch pin leaking into it, an sdist
that cannot build, a console script that starts only in the checkout, a CI that tests something else than the README, a
benchmark that needs an install.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import capfilt

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str | Path], cwd: Path, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def files_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A directory with the sdist, and the wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], cwd=out)
    return out


@pytest.fixture(scope="session")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(built) -> Path:
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "capfilt",
        f"capfilt-{capfilt.__version__}.dist-info",
    }
    assert not [name for name in names if "constraints" in name]
    assert "capfilt/py.typed" in names


@pytest.mark.parametrize("directory", ["pipelines", "schemas"])
def test_the_wheel_and_the_sdist_carry_the_resources(wheel, sdist, directory):
    expected = files_below(ROOT / directory)
    inside = f"capfilt/_resources/{directory}/"
    assert {
        name.removeprefix(inside) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(inside)
    } == expected
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"{directory}/{name}" for name in expected} <= names
    assert {"constraints.txt", "LICENSE", "README.md", "tests/conftest.py"} <= names


def test_the_wheel_pins_no_torch_build(metadata):
    requirements = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist")]
    assert [line for line in requirements if line.startswith("torch")] == ["torch>=2.6"]
    # Anything that must be a fetched extra stays one: a GPU box gets by without it.
    core = [line for line in requirements if "extra==" not in line]
    assert not [
        line for line in core if line.startswith(("img2dataset", "transformers", "datasets", "pycocoevalcap"))
    ]
    # Once in its own extra, once where the dev extra includes it.
    assert all("python_version<'3.13'" in line for line in requirements if line.startswith("img2dataset"))
    assert metadata["Requires-Python"] == ">=3.11"


def fresh_python(directory: Path) -> Path:
    """A new environment's Python that sees what this one has installed, but no capfilt: an install takes seconds.

    A path line in a .pth file adds a directory without reading the .pth files in it, so an editable capfilt of the
    environment that runs the tests stays invisible.
    """
    run([sys.executable, "-m", "venv", "--without-pip", directory], cwd=directory.parent)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return directory / "bin" / "python"


LOOK = """
import json, sys, capfilt
from capfilt import resources
recipes = {name: str(resources.find_recipe(name)) for name in resources.list_recipes()}
print(json.dumps({"package": capfilt.__file__, "recipes": recipes, "schemas": str(resources.schema_dir())}))
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_install_finds_its_resources_and_starts(kind, wheel, sdist, tmp_path):
    before = files_below(ROOT / "capfilt")
    python = fresh_python(tmp_path / "venv")
    target = {"wheel": [wheel], "sdist": [sdist], "editable": ["-e", ROOT]}[kind]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--no-build-isolation", "--ignore-installed", *target], cwd=tmp_path)

    seen = json.loads(run([python, "-I", "-c", LOOK], cwd=tmp_path))
    root = ROOT if kind == "editable" else Path(seen["package"]).parent / "_resources"
    assert Path(seen["package"]).is_relative_to(ROOT if kind == "editable" else tmp_path / "venv")
    assert seen["schemas"] == str(root / "schemas")
    assert set(seen["recipes"]) == {path.stem for path in (ROOT / "pipelines").glob("*.yaml")}
    assert {Path(path).parent for path in seen["recipes"].values()} <= {root / "pipelines"}
    assert files_below(root / "schemas") == files_below(ROOT / "schemas")

    assert "quickstart" in run([tmp_path / "venv" / "bin" / "capfilt", "--help"], cwd=tmp_path)
    assert "quickstart" in run([python, "-I", "-m", "capfilt", "--help"], cwd=tmp_path)
    stray = {name for name in files_below(ROOT / "capfilt") - before if "__pycache__" not in name}
    assert not stray, "installing must not write into the checkout"


def test_the_readme_has_one_command_for_the_tests_and_one_for_the_loop():
    """CI runs the first of them as it stands; both install with the tested torch build."""
    text = (ROOT / "README.md").read_text()
    for marker, needed in [("test command", ".[dev]"), ("main command", ".[img2dataset]")]:
        assert text.count(f"<!-- {marker} -->\n```") == 1, marker
        block = text.split(f"<!-- {marker} -->\n```", 1)[1].split("```", 1)[0]
        assert f"-c constraints.txt -e '{needed}'" in block


@pytest.fixture
def clone(tmp_path) -> Path:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    return tmp_path


FAKE_JUST = (
    "mkdir -p .venv/bin && printf '#!/bin/sh\\necho just \"$@\"' > .venv/bin/just && chmod +x .venv/bin/just"
)


def test_ci_runs_the_readmes_test_command_and_then_the_checks(clone):
    tests = f"{FAKE_JUST}\necho '===== 3 passed, 1 skipped in 0.10s ====='"
    other = "```bash\nexit 9\n```"
    (clone / "README.md").write_text(f"{other}\n<!-- test command -->\n```bash\n{tests}\n```\n{other}\n")
    lines = run(["bash", ".ci/run"], cwd=clone).splitlines()
    assert "just check" in lines
    assert lines[-1] == "===== 3 passed, 1 skipped in 0.10s ====="


@pytest.mark.parametrize(
    ("readme", "told"),
    [
        ("<!-- test command -->\n```\n" + FAKE_JUST + "\necho '== 1 failed ==' && exit 3\n```\n", "1 failed"),
        ("```\npytest\n```\n", "no code block after"),
        ("<!-- test command -->\n```\n```\n", "no code block after"),
    ],
)
def test_ci_fails_when_the_tests_fail_or_are_not_there(clone, readme, told):
    (clone / "README.md").write_text(readme)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    command = ["bash", ".ci/run"]
    result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert told in result.stdout + result.stderr
    assert "just check" not in result.stdout


def test_benchmarks_start_in_a_checkout_that_is_not_installed():
    # Without `site` no .pth is read, so an editable install of this checkout does not help.
    start = (
        "import runpy, sys; script, *packages = sys.argv[1:]; sys.path[:] += packages; "
        "sys.path.insert(0, str(__import__('pathlib').Path(script).parent)); "
        "sys.argv[:] = [script, '--help']; runpy.run_path(script, run_name='__main__')"
    )
    scripts = sorted((ROOT / "benchmarks").glob("[a-z]*.py"))
    assert scripts
    started = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", start, script, *site.getsitepackages()],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in scripts
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
