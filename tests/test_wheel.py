"""The wheel: what is in it, and that it works where there is no checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import kd_core

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "infra", "kd_core", "tasks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    [built] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    return Path(built)


def test_every_file_of_the_packages_and_every_recipe_is_in_it_and_nothing_else(wheel: Path) -> None:
    there = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {name for name in there.stdout.splitlines() if (ROOT / name).is_file()}
    assert {Path(name).suffix for name in wanted} >= {".py", ".jinja", ".yaml", ".typed"}
    wanted |= {f"kd_core/recipe/shipped_recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [info] = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        read = {name: archive.read(f"{info}/{name}").decode() for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")}
    assert f"Version: {kd_core.__version__}\n" in read["METADATA"]
    assert "License-Expression: Apache-2.0\n" in read["METADATA"]
    assert "kd = flows.cli:main" in read["entry_points.txt"]
    assert "Apache License" in read["licenses/LICENSE"]


@pytest.mark.drill
@pytest.mark.stack
def test_it_runs_a_recipe_and_a_stack_outside_the_checkout(wheel: Path, small_overrides: list[str], tmp_path: Path) -> None:
    """Installed beside the other packages of this environment, whose own install of the checkout it stands before."""
    installed, outside = tmp_path / "installed", tmp_path / "outside"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    subprocess.run(pip, check=True)
    outside.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PATH": path}

    def called(*command: str) -> str:
        done = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    kd = str(installed / "bin" / "kd")
    place = called(sys.executable, "-c", "import kd_core, flows.cli; print(kd_core.__file__, flows.cli.__file__)").split()
    assert all(Path(file).is_relative_to(installed) for file in place)
    changed = [word for override in small_overrides for word in ("--set", override)]
    assert json.loads(called(kd, "run", "--local", "quickstart", *changed, "--json"))["verdict"]["promote"] is True
    called(kd, "report", "quickstart", *changed)
    assert "<html" in (outside / "reports/small/report.html").read_text()
    try:
        called(kd, "up")
        listed = called("sh", "-c", "set -a; . .kd/stack/env; set +a; prefect deployment ls")
        assert all(name in listed for name in ("distill/on-demand", "distill/nightly", "evaluate_model/on-demand"))
    finally:
        called(kd, "down")
