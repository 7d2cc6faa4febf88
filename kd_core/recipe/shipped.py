"""Recipes that come with the package, found by their names: ``kd run quickstart``, wherever one stands.

In a wheel they lie beside this module, in a checkout in its folder recipes/; pyproject.toml maps one to the other.
"""

from pathlib import Path

__all__ = ["recipe_file", "shipped_recipes"]

_IN_WHEEL = Path(__file__).with_name("shipped_recipes")
_IN_CHECKOUT = Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe, by name."""
    folder = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe_file(named: str | Path) -> Path:
    """The file that is meant: the one at this path, or where there is none the shipped recipe of this name."""
    path = Path(named)
    return path if path.is_file() else shipped_recipes().get(str(named), path)
