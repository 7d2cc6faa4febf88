"""Arrows point one way: flows -> tasks -> kd_core; and kd_core never knows an orchestrator or a registry."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "kd_core": {"tasks", "flows", "infra", "prefect", "mlflow"},
    "tasks": {"flows", "infra"},
    "infra": {"tasks", "flows", "kd_core.stages"},
}


def _modules(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert len(names) >= {"kd_core": 50, "tasks": 5, "infra": 3}[package], f"the search for {package} modules found too few"
    return names


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_down(package: str) -> None:
    for name in _modules(package):
        base = ROOT / Path(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        for imported in _imports(path):
            wrong = [bad for bad in FORBIDDEN[package] if imported == bad or imported.startswith(bad + ".")]
            assert not wrong, f"{path} imports {imported}"


def test_kd_core_runs_without_prefect_and_mlflow() -> None:
    imports = "\n".join(f"import {name}" for name in _modules("kd_core"))
    code = f"{imports}\nimport sys\nprint(sorted({{'prefect', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_exports_exist() -> None:
    checked = 0
    for name in _modules("kd_core"):
        module = __import__(name, fromlist=["__all__"])
        for exported in getattr(module, "__all__", ()):
            assert hasattr(module, exported), f"{name}.__all__ names {exported}"
            checked += 1
    assert checked > 100


def test_every_stage_is_in_the_file_of_its_name() -> None:
    from kd_core.stages.run import STAGES

    assert len(STAGES) >= 11
    for stage in STAGES:
        file = ROOT / "kd_core" / "stages" / f"{stage}.py"
        assert f"def {stage}_stage(job: Job)" in file.read_text(), f"{file} holds no {stage}_stage"


def test_loose_files_of_kd_core() -> None:
    """Everything else has a room."""
    loose = {path.stem for path in (ROOT / "kd_core").glob("*.py")} - {"__init__"}
    assert loose <= {"errors", "fingerprint", "progress", "failpoints", "artifacts", "summaries", "ledger", "library"}


def test_no_circle_among_the_rooms_of_kd_core() -> None:
    """Rooms (folders and loose files of kd_core) can be put in an order in which each imports only earlier ones."""
    rooms: dict[str, set[str]] = {}
    for name in _modules("kd_core"):
        if name == "kd_core":
            continue
        base = ROOT / Path(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        room = name.split(".")[1]
        imported = {module.split(".")[1] for module in _imports(path) if module.startswith("kd_core.")}
        rooms.setdefault(room, set()).update(imported - {room})
    order = list(graphlib.TopologicalSorter(rooms).static_order())  # raises CycleError, which names the circle
    assert len(order) >= 20
