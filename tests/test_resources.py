"""Would catch: a user's file shadowing a packaged recipe, another package's `schemas` folder taken for ours, a
misspelt recipe answered by a traceback.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from capfilt import resources
from tests.refusals import failed, refused

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout with two recipes and a cluster folder, into which the resolver is made to look."""
    for name in ("quickstart.yaml", "photographs.yaml", "cluster/rayjob.yaml"):
        path = tmp_path / "checkout" / "pipelines" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("version: 1\n")
    (tmp_path / "checkout" / "schemas").mkdir()
    (tmp_path / "checkout" / "pyproject.toml").touch()
    (tmp_path / "checkout" / "capfilt").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "checkout" / "capfilt")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkout"


def test_the_checkouts_own_directories_are_found():
    assert resources.schema_dir() == ROOT / "schemas"
    for name in resources.list_recipes():
        assert resources.find_recipe(name) == ROOT / "pipelines" / f"{name}.yaml"


def test_only_yaml_files_at_the_top_are_recipes(house):
    (house / "pipelines" / "notes.md").touch()
    assert resources.list_recipes() == ["photographs", "quickstart"]


def test_cluster_files_are_no_recipes_and_are_whole():
    """Would catch a RayJob that is run as a recipe, and files for clusters that no cluster takes."""
    folder = ROOT / "pipelines" / "cluster"
    assert not {path.stem for path in folder.iterdir()} & set(resources.list_recipes())
    subprocess.run(["bash", "-n", folder / "slurm.sh"], check=True)
    job = yaml.safe_load((folder / "rayjob.yaml").read_text())
    assert job["kind"] == "RayJob"
    assert job["spec"]["entrypoint"].startswith("capfilt run ")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        named = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {"workspace"} <= {mount["name"] for mount in container["volumeMounts"]} <= named
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert len(images) == 1


def test_a_name_is_never_taken_from_the_working_directory(house, tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert resources.find_recipe("quickstart") == house / "pipelines" / "quickstart.yaml"
    assert resources.find_recipe("quickstart.yaml") == tmp_path / "quickstart.yaml"


def test_a_path_is_taken_as_given(house, tmp_path):
    mine = tmp_path / "deep" / "mine"
    mine.parent.mkdir()
    mine.touch()
    assert resources.find_recipe("deep/mine") == mine
    assert resources.find_recipe("deep/../deep/mine") == mine
    assert resources.find_recipe(house / "pipelines" / "quickstart.yaml").name == "quickstart.yaml"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("photograph", "photograph photographs"),
        ("nonsense", "nonsense photographs, quickstart"),
        ("pipelines/quickstart.yaml", "pipelines/quickstart.yaml 'quickstart'"),
        ("./deep.yaml", "./deep.yaml directory"),
        ("", "recipe name"),
        ("..", "recipe name"),
    ],
)
def test_an_unknown_recipe_is_one_line_that_says_what_to_do(house, tmp_path, asked, told):
    (tmp_path / "deep.yaml").mkdir()
    with refused(told):
        resources.find_recipe(asked)


def test_the_packaged_copy_is_preferred(house):
    packaged = house / "capfilt" / "_resources"
    shutil.copytree(house / "pipelines", packaged / "pipelines")
    (packaged / "pipelines" / "photographs.yaml").unlink()
    assert resources.list_recipes() == ["quickstart"]
    assert resources.find_recipe("quickstart").is_relative_to(packaged)


def test_a_neighbour_in_site_packages_is_not_ours(house):
    (house / "pyproject.toml").unlink()
    with failed("installation"):
        resources.schema_dir()


def test_the_resolver_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import capfilt.resources; print(*(set(sys.modules) - before))"
    )
    command = [sys.executable, "-S", "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"capfilt"}
    assert not foreign
