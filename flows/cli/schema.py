"""``kd schema``: the recipe's fields, for editors and for readers. Prints what kd_core.recipe.schema and .reference make."""

import json
from typing import Annotated

import typer

__all__ = ["schema"]


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The field reference, as in docs/recipe.md, in place of JSON.")] = False,
) -> None:
    """Print the recipe's JSON Schema, which editors complete and check recipes by."""
    from kd_core.recipe.reference import recipe_reference
    from kd_core.recipe.schema import recipe_schema

    if not markdown:
        return print(json.dumps(recipe_schema(), indent=1))
    from kd_core.stages.moves import field_moves

    print(recipe_reference(field_moves()), end="")
