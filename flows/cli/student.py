"""``kd student ...``: the student of a recipe, before there is one. Shows what kd_core.student finds; owns no logic."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from flows.cli.console import display
from flows.cli.options import HELP, AsJson, Overrides, RecipeFile, print_json
from flows.cli.terminal import say

if TYPE_CHECKING:
    from rich.table import Table

    from kd_core.student.describe import Description

__all__ = ["student_app"]

student_app = typer.Typer(
    name="student",
    help="Look at the student of a recipe, before there is one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)

_NAMES = {
    "dtype": "run in",
    "vocabulary": "vocabulary",
    "parameters": "parameters",
    "trainable_parameters": "parameters that learn",
    "bytes": "bytes of weights",
    "flops_a_token": "FLOPs a token, forward",
    "attention_flops_a_token": "  and for each token of context",
    "kv_cache_bytes_a_token": "KV-cache bytes a token",
}


@student_app.callback()
def _group() -> None:
    """Look at the student of a recipe, before there is one."""


@student_app.command("describe")
def describe_command(recipe_file: RecipeFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show the student's size and cost beside the teacher's. Loads no weights, computes nothing."""
    with display(quiet=as_json) as shown:
        shown.step(f"reading {recipe_file}")
        from kd_core.recipe.files import load_recipe

        recipe = load_recipe(recipe_file, overrides)
        shown.step("reading configurations of models")
        from kd_core.stages.vocabulary import trimmed_tokens
        from kd_core.store import open_store
        from kd_core.student.describe import describe

        kept = None if recipe.student.vocabulary is None else trimmed_tokens(recipe, open_store(recipe.run.store, recipe.run.s3))
        found = describe(recipe, kept_tokens=kept)
    if as_json:
        teacher, ratios = None if found.teacher is None else asdict(found.teacher), found.ratios()
        said = {"student": asdict(found.student), "teacher": teacher, "ratios": None if ratios is None else dict(ratios)}
        return print_json({**said, "untrimmed": found.untrimmed})
    from flows.cli.tables import show

    show(_table(found))
    if found.untrimmed:
        say("student.vocabulary is trimmed when the rows are there (kd run): until then the student's figures are upper bounds")


def _table(found: "Description") -> "Table":
    from flows.cli.tables import table

    made = table("Student (nothing has been run)", ("",), ("student", "teacher", "ratio"))
    theirs = {} if found.teacher is None else asdict(found.teacher)
    ratios = found.ratios() or {}
    for name, value in asdict(found.student).items():
        ratio = f"{ratios[name]:.3f}" if name in ratios else "-"
        made.add_row(_NAMES[name], _text(value), _text(theirs.get(name)), ratio)
    return made


def _text(value: int | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,}"
