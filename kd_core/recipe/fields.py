"""Forms of values that all parts of a recipe share."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FILLED", "Fraction", "Frozen", "Revision", "Slug", "filled"]


Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


FILLED = "x-filled-in"
"""Key of a field's JSON Schema under which stands what the field becomes where a recipe leaves it out."""


def filled(rule: str) -> dict[str, Any]:
    """JSON Schema extra of a field that may be left out since ``defaults`` fills it in; the rule is for readers of the reference."""
    return {FILLED: rule}


def _not_required(schema: dict[str, Any]) -> None:
    """Take fields that are filled in from those that a JSON Schema requires or gives one default to."""
    properties = schema.get("properties", {})
    for field in properties.values():
        if FILLED in field:
            field.pop("default", None)
    required = [name for name in schema.pop("required", ()) if FILLED not in properties[name]]
    if required:
        schema["required"] = required


class Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        json_schema_extra=_not_required,
    )
