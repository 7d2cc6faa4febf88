"""The command ``kd recipes``: the recipes that come with the package, to run by name or to start one's own from."""

import json
import textwrap
from typing import Annotated

import typer

from flows.cli.terminal import say
from kd_core.errors import RecipeError

__all__ = ["recipes"]

_SCHEMA = "# yaml-language-server:"
"""Begins a line that points to the schema from the checkout's folder of recipes; a printed recipe is going elsewhere."""


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one: kd recipes quickstart > mine.yaml")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output and nothing else.")] = False,
) -> None:
    """List the recipes that come with the package; with a name, print that recipe."""
    from kd_core.recipe.files import load_recipe
    from kd_core.recipe.shipped import shipped_recipes

    shipped = shipped_recipes()
    if name is not None and name not in shipped:
        raise RecipeError(f"no shipped recipe is called {name!r}; there are {', '.join(shipped)}")
    if name is not None:
        lines = shipped[name].read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(line for line in lines if not line.startswith(_SCHEMA))
        return print(json.dumps({"name": name, "yaml": text}) if as_json else text, end="\n" if as_json else "")
    about = {each: load_recipe(file).description for each, file in shipped.items()}
    if as_json:
        return print(json.dumps({"recipes": about}, indent=1))
    for each, description in about.items():
        say(f"{each}\n{textwrap.fill(description, 78, initial_indent='    ', subsequent_indent='    ')}")
    say("\nRun one by its name:      kd run quickstart\nStart your own from one:  kd recipes quickstart > mine.yaml")
