"""Paths of a recipe start from its own folder, those of overrides from the working directory; and errors say their line."""

import re
from pathlib import Path
from typing import Any

import pytest

from kd_core.errors import RecipeError, SourceError
from kd_core.prompts import collect_prompts
from kd_core.recipe import FileSource, PretrainedTeacher, Recipe
from kd_core.recipe.core_yaml import write_yaml
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore
from kd_core.teacher.reference import locate

SOURCE = {"kind": "file", "path": "data/a.jsonl", "prompt": "{q}", "gold": "{a}"}
DATA: dict[str, Any] = {
    "name": "test",
    "seeds": [1],
    "task": {"template": "plain", "verifier": "exact"},
    "prompts": {"sources": [SOURCE], "split": {"validation": 0.1, "test": 0.2}},
    "teacher": {"kind": "pretrained", "model": "models/big"},
    "answers": None,
    "soft_labels": None,
    "student": {"kind": "from_teacher", "every_nth_block": 2},
    "objective": {"supervision": "hard"},
    "training": {"steps": 2, "batch_rows": 1, "learning_rate": 0.1},
    "evaluation": {
        "suites": [{"kind": "source", "name": "s", "source": SOURCE | {"path": "data/b.jsonl"}}],
        "generate": None,
        "compare": [],
    },
    "gate": {"rules": [{"kind": "ceiling", "metric": "bytes", "maximum": 1.0}]},
    "publish": "test",
}


def project(folder: Path, **changes: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "data/a.jsonl").write_text("".join(f'{{"q": "{i}+1=", "a": "{i + 1}"}}\n' for i in range(60)))
    (folder / "data/b.jsonl").write_text('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}\n')
    (folder / "models/big").mkdir(parents=True)
    (folder / "models/big/config.json").write_text("{}")
    (folder / "own.yaml").write_text(write_yaml({**DATA, **changes}))
    return folder / "own.yaml"


def paths(recipe: Recipe) -> list[str]:
    assert isinstance(recipe.teacher, PretrainedTeacher)
    (suite,) = recipe.evaluation.suites
    sources = [*recipe.prompts.sources, suite.source]  # type: ignore[union-attr]
    return [*(source.path for source in sources if isinstance(source, FileSource)), recipe.teacher.model]


def test_paths_start_from_the_recipe_s_folder_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("mine/own.yaml")
    assert paths(recipe) == ["mine/data/a.jsonl", "mine/data/b.jsonl", "mine/models/big"]
    assert collect_prompts(recipe).counts["read"] == 60
    monkeypatch.chdir(tmp_path / "mine")
    assert paths(load_recipe("own.yaml")) == ["data/a.jsonl", "data/b.jsonl", "models/big"]
    absolute = load_recipe(tmp_path / "mine/own.yaml", ["prompts.sources.0.path=other.jsonl", "teacher.model=big"])
    assert paths(absolute) == ["other.jsonl", str(tmp_path / "mine/data/b.jsonl"), "big"]


def test_an_alias_is_moved_once(tmp_path: Path) -> None:
    path = project(tmp_path, prompts={"sources": [SOURCE, SOURCE], "split": {"validation": 0.1, "test": 0.2}})
    assert "&id" in path.read_text(), "this test needs one value in two places"
    assert paths(load_recipe(path))[:2] == [str(tmp_path / "data/a.jsonl")] * 2


def test_what_is_no_relative_path_stays(tmp_path: Path) -> None:
    sources = [{**SOURCE, "path": path} for path in ("s3://b/a.jsonl", "/abs/a.jsonl", "~/a.jsonl")]
    prompts = {"sources": sources, "split": {"validation": 0.1, "test": 0.2}}
    for model, revision in (("org/name", "0" * 40), ("pkg://llm/x.gguf", None), ("org/name", None)):
        teacher = {"kind": "pretrained", "model": model, "revision": revision}
        found = paths(load_recipe(project(tmp_path / f"{model[:3]}{revision}", prompts=prompts, teacher=teacher)))
        assert (found[:3], found[-1]) == (["s3://b/a.jsonl", "/abs/a.jsonl", "~/a.jsonl"], model)


def test_a_directory_here_is_not_taken_for_one_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project(tmp_path / "mine", teacher={"kind": "pretrained", "model": "first"})
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path)
    teacher = load_recipe(path).teacher
    assert isinstance(teacher, PretrainedTeacher)
    with pytest.raises(RecipeError, match=r"mine/first' is no local directory here"):
        locate(teacher)


def test_fingerprints_do_not_know_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    found = []
    for folder in ("one", "another/two"):
        project(tmp_path / folder)
        monkeypatch.chdir(tmp_path / folder)
        for path in ("own.yaml", tmp_path / folder / "own.yaml"):
            found.append({name: node.fingerprint for name, node in build_graph(load_recipe(path), store).items()})
    assert len(found[0]) >= 8
    assert all(other == found[0] for other in found)
    (tmp_path / "one/data/a.jsonl").write_text('{"q": "1+1=", "a": "2"}\n')
    changed = build_graph(load_recipe(tmp_path / "one/own.yaml"), store)
    assert {name for name in found[0] if changed[name].fingerprint != found[0][name]} >= {"prompts", "report"}


@pytest.mark.parametrize(
    ("changes", "overrides", "lines"),
    [
        ({"training": {**DATA["training"], "steps": 0}}, [], [r":\d+: training\.steps: "]),
        ({"nam": 1}, [], [r":\d+: nam: unknown field"]),
        ({"prompts": {"split": {"validation": 0.1, "test": 0.2}}}, [], [r":\d+: prompts\.sources: this field is required"]),
        ({"seeds": [1, 1]}, [], [r":\d+: seeds: a seed stands twice"]),
        ({}, ["training.steps=0"], [r": training\.steps: "]),
        (
            {"training": {"steps": 2, "batch_rows": 0, "learning_rate": 0.1}},
            ["training.steps=0"],
            [r": training\.st", r":\d+: training\.b"],
        ),
    ],
)
def test_a_mistake_says_its_line_in_the_file(tmp_path: Path, changes: dict[str, Any], overrides: list[str], lines: list[str]) -> None:
    path = project(tmp_path, **changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = path.read_text().splitlines()
    for line, wanted in zip(str(caught.value).splitlines(), lines, strict=True):
        found = re.match(rf"{re.escape(str(path))}{wanted}", line)
        assert found, line
        if number := re.match(rf"{re.escape(str(path))}:(\d+): (?:\w+\.)*(\w+)", line):
            named = text[int(number[1]) - 1].split(":")[0].strip()
            assert named in (number[2], "prompts"), "the line of the field, or of what lacks it"


def test_a_row_says_its_line_in_a_path_that_one_can_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path / "mine")
    (tmp_path / "mine/data/a.jsonl").write_text('{"q": "1+1="}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"^mine/data/a\.jsonl:1: no column 'a', which prompts\.sources\.0\.gold needs"):
        collect_prompts(load_recipe("mine/own.yaml"))
