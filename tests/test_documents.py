"""Documents say what is true: paths exist, commands exist, recipes load, numbers in a recipe's header are its own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kd_core.recipe.files import load_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_is_something_to_check() -> None:
    assert len(DOCUMENTS) >= 4
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    """Every `path/with/slash.ext` in back quotes is a file here."""
    found = re.findall(r"`((?:kd_core|tasks|flows|infra|recipes|tests|benchmarks|docs)/[\w./-]*\w)/?`", document.read_text())
    missing = [path for path in found if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_to_files(document: Path) -> None:
    """Anchors are checked by mkdocs --strict, which `make check` runs."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert not [link for link in links if not (document.parent / link).is_file()]


def test_every_trap_names_tests_and_checks_that_exist() -> None:
    """docs/traps.md: `tests/file.py::test_name`, the names of the doctor's checks, and traps by number, each once."""
    from kd_core.doctor import check_names

    text = (ROOT / "docs" / "traps.md").read_text()
    found = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(found) >= 24
    assert not [f"{path}::{name}" for path, name in found if f"def {name}(" not in (ROOT / path).read_text()]
    assert {name for name in check_names() if f"`{name}`" not in text} == set()
    numbers = [int(n) for cell in re.findall(r"^\| ([\d, ]+) \|", text, re.M) for n in cell.split(",")]
    assert len(numbers) == len(set(numbers))
    assert set(range(1, 28)) <= set(numbers) <= set(range(1, 47))


def test_readme_tour_has_six_files() -> None:
    readme = (ROOT / "README.md").read_text()
    tour = readme[readme.index("## A tour") :]
    assert len(re.findall(r"^\d\. `[\w./]+\.\w+`", tour, re.M)) == 6


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_documents_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    code = "\n".join(re.findall(r"`[^`]*`|^    .*$", document.read_text(), re.M))
    named = set(re.findall(r"(?:^|`)\s*(?:\w+=\S+ )?make ([a-z]+)", code, re.M))
    assert named <= targets


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("build", ["", "cpu", "cu130"])
def test_set_up_takes_the_build_of_torch_that_it_is_told(build: str, tmp_path: Path) -> None:
    command = ["make", "-n", "setup", f"VENV={tmp_path}", f"TORCH={build}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [install] = [line for line in said.splitlines() if "--editable" in line]
    [pinned] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert "+" not in pinned, "a build that the package index may not have"
    wanted = f" --extra-index-url https://download.pytorch.org/whl/{build} '{pinned}+{build}'" if build else ""
    assert install.rstrip().endswith(f"-c constraints.txt --editable '.[stack,dev]'{wanted}")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid_and_say_how_to_run_them(recipe: Path) -> None:
    assert load_recipe(recipe).name == recipe.stem
    header = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"recipes/{recipe.name}" in header, "the header has the command"


def test_no_address_of_a_machine_is_committed() -> None:
    """Neither paths of somebody's machine nor download addresses of a package index."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert len(names) > 100
    index = re.compile(r"(py" + r"pi|npm" + r"js)\.(org|com)|python" + r"hosted|(^|[\s\"'=(])/(wo" + r"rk|home|Users)/")
    for name in filter(None, names):
        if (ROOT / name).suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".jinja", ""} and (ROOT / name).is_file():
            match = index.search((ROOT / name).read_text(errors="ignore"))
            assert match is None, f"{name} holds {match.group(0)!r}"


def test_the_map_of_rooms_is_whole_and_in_order() -> None:
    """ARCHITECTURE.md lists every room of kd_core, each below all that it imports."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = re.findall(r"^    (\w+) {2,}\S", text[text.index("## The rooms of kd_core") : text.index("## The graph")], re.M)
    found: dict[str, set[str]] = {}
    for file in (ROOT / "kd_core").rglob("*.py"):
        room = file.relative_to(ROOT / "kd_core").with_suffix("").parts[0]
        if room != "__init__":
            found.setdefault(room, set()).update(re.findall(r"^\s*(?:from|import) kd_core\.(\w+)", file.read_text(), re.M))
    assert sorted(listed) == sorted(found), "a room is missing in ARCHITECTURE.md, or is gone"
    for place, room in enumerate(listed):
        assert found[room] <= {*listed[: place + 1]}, f"{room} imports rooms that stand below it"


def test_every_entry_of_the_log_has_four_lines() -> None:
    """A question, what was done, what was found, what was decided."""
    entries = [part for part in (ROOT / "docs" / "LOG.md").read_text().split("\n\n") if part.startswith("**")]
    assert len(entries) >= 20
    for entry in entries:
        assert re.fullmatch(r"\*\*[^\n]+\?\*\*\n- Done: [^\n]+\n- Found: [^\n]+\n- Decided: [^\n]+\n?", entry), entry
