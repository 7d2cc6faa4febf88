"""The schema accepts what the recipe accepts, and what is committed of it is what the types say today."""

import json
from pathlib import Path
from typing import Any

import pytest

from kd_core.recipe.core_yaml import read_yaml
from kd_core.recipe.fields import FILLED
from kd_core.recipe.files import dump_recipe, load_recipe
from kd_core.recipe.schema import DIALECT, recipe_schema

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "recipe.schema.json"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHORT: dict[str, Any] = {
    "name": "mine",
    "prompts": {"sources": [{"kind": "file", "path": "data.jsonl", "prompt": "{q}", "gold": "{a}"}]},
    "teacher": {"kind": "pretrained", "model": "m"},
    "student": {"kind": "from_teacher", "every_nth_block": 2},
}


@pytest.fixture
def accepts() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema()).is_valid


def test_the_committed_schema_is_fresh() -> None:
    assert json.loads(COMMITTED.read_text()) == recipe_schema(), "write it anew: kd schema > docs/recipe.schema.json"
    assert recipe_schema()["$schema"] == DIALECT


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_its_schema_and_follows_it(path: Path, accepts: Any) -> None:
    first = path.read_text().splitlines()[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == COMMITTED
    assert accepts(read_yaml(path.read_text(), path.name))
    assert accepts(read_yaml(dump_recipe(load_recipe(path)), "dump")), "written out whole, too"


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"answers": None}, True),
        ({"training": {"steps": 5}}, True),
        ({"objective": {"divergence": "jsd", "temperature": 2}}, True),
        ({"objective": {"divergence": {"kind": "jsd", "beta": 0.2}, "hard_weight": {"kind": "linear", "start": 1, "end": 0}}}, True),
        ({"trainig": {}}, False),
        ({"training": {"steps": 0}}, False),
        ({"training": {"learning_rate": "fast"}}, False),
        ({"teacher": {"kind": "oracle"}}, False),
        ({"student": None}, False),
        ({"seeds": []}, False),
    ],
)
def test_an_editor_tells_right_from_wrong(change: dict[str, Any], valid: bool, accepts: Any) -> None:
    assert accepts({**SHORT, **change}) == valid


def test_only_what_a_recipe_must_say_is_required() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["name", "prompts", "teacher", "student"]
    for part in (schema, *schema["$defs"].values()):
        for name, value in part.get("properties", {}).items():
            assert FILLED not in value or (name not in part.get("required", ()) and "default" not in value)
            assert value.get("description", "").endswith(".") or name in ("kind", "revision", "dtype"), f"{part}: {name}"
            assert FILLED not in value or f"Left out: {value[FILLED]}." in value["description"]
