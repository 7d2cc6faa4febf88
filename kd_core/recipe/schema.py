"""The recipe as JSON Schema (draft 2020-12), for editors and forms: types, ranges, defaults, and what each field means."""

import re
from typing import Any

from kd_core.recipe.fields import FILLED
from kd_core.recipe.recipe import Recipe

__all__ = ["DIALECT", "recipe_schema", "written_in_yaml"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Plain data of the schema that every recipe follows; a description ends with what becomes of a field that is left out."""
    schema = _readable(Recipe.model_json_schema())
    return {"$schema": DIALECT, **schema, "title": "Recipe of a distillation"}


def written_in_yaml(text: str) -> str:
    """A text of this code's docstrings in the words of a recipe, in one line.

    >>> written_in_yaml("None keeps all; False\\nkeeps `NoneType`")
    'null keeps all; false keeps `NoneType`'
    """
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda found: words[found[0]], " ".join(text.split()))


def _readable(schema: Any) -> Any:
    """The schema without titles that repeat names, and descriptions as a reader of YAML needs them."""
    if isinstance(schema, list):
        return [_readable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _readable(value) for name, value in schema.items() if name != "title" or not isinstance(value, str)}
    if isinstance(text := found.get("description"), str):
        rule = found.get(FILLED)
        found["description"] = written_in_yaml(text) + ("" if rule is None else f" Left out: {rule}.")
    return found
