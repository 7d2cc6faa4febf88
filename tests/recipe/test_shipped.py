"""Shipped recipes by name."""

import json
from pathlib import Path

import pytest

from kd_core.errors import RecipeError
from kd_core.recipe.files import load_recipe
from kd_core.recipe.shipped import recipe_file, shipped_recipes


def test_every_recipe_is_found_by_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_recipes()
    assert len(shipped) >= 5
    assert {load_recipe(name).name for name in shipped} == set(shipped)


def test_a_file_of_that_name_comes_first_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert recipe_file("quickstart") == shipped_recipes()["quickstart"]
    Path("born-again").write_text("name: mine")
    assert recipe_file("born-again") == Path("born-again")


def test_a_recipe_that_is_nowhere_is_refused_with_the_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"recipes/quickstart.yaml: cannot be read .*or a name: .*quickstart"):
        load_recipe("recipes/quickstart.yaml")


def test_the_command_lists_and_prints_them(kd):
    listed = kd("recipes")
    assert all(name in listed.out for name in shipped_recipes())
    assert max(map(len, listed.out.splitlines())) <= 80
    assert set(json.loads(kd("recipes", "--json").out)["recipes"]) == set(shipped_recipes())
    printed = kd("recipes", "quickstart")
    schema, _, rest = shipped_recipes()["quickstart"].read_text().partition("\n")
    assert (schema.startswith("# yaml-language-server:"), printed.out) == (True, rest)
    assert json.loads(kd("recipes", "quickstart", "--json").out)["yaml"] == printed.out
    unknown = kd("recipes", "quickstrat")
    assert (unknown.code, "quickstart" in unknown.err) == (2, True)
