"""Fingerprints of the shipped recipes, written down: a change of code moves the nodes that it means to, and nobody's cache by accident.

Where a move is meant: KD_WRITE_GOLDEN=1 pytest tests/stages/test_golden_fingerprints.py, and say in the commit which nodes moved and why.
"""

import json
import os
from pathlib import Path

import pytest

from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_fingerprints.json")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_fingerprints_are_those_written_down(recipe: Path, tmp_path: Path) -> None:
    nodes = build_graph(load_recipe(recipe), LocalStore(tmp_path / "store"))
    found = {name: node.fingerprint for name, node in nodes.items()}
    golden = json.loads(GOLDEN.read_text())
    if "KD_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(json.dumps({**golden, recipe.stem: found}, indent=1, sort_keys=True) + "\n")
        return
    moved = sorted(name for name in golden[recipe.stem] | found if golden[recipe.stem].get(name) != found.get(name))
    assert moved == [], f"{recipe.stem}: these nodes moved, so every user computes them again"


def test_every_shipped_recipe_is_written_down() -> None:
    assert len(RECIPES) >= 5
    assert set(json.loads(GOLDEN.read_text())) == {recipe.stem for recipe in RECIPES}
