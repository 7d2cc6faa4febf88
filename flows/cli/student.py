"""``kd student ...``: the student of a recipe, before there is one. Shows what kd_core.student finds; owns no logic."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

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
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or a shipped one's name (kd recipes).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Change a field: --set student.every_nth_block=2. May be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output and nothing else.")]

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
    from kd_core.recipe.files import load_recipe
    from kd_core.stages.vocabulary import trimmed_tokens
    from kd_core.store import open_store
    from kd_core.student.describe import describe

    recipe = load_recipe(recipe_file, overrides)
    kept = None if recipe.student.vocabulary is None else trimmed_tokens(recipe, open_store(recipe.run.store, recipe.run.s3))
    found = describe(recipe, kept_tokens=kept)
    if as_json:
        teacher = None if found.teacher is None else asdict(found.teacher)
        ratios = found.ratios()
        say(
            json.dumps(
                {
                    "student": asdict(found.student),
                    "teacher": teacher,
                    "ratios": None if ratios is None else dict(ratios),
                    "untrimmed": found.untrimmed,
                },
                indent=1,
            )
        )
        return
    from flows.cli.tables import show

    show(_table(found))
    if found.untrimmed:
        say("student.vocabulary is trimmed when the rows are there (kd run): until then the student's figures are upper bounds")


def _table(found: "Description") -> "Table":
    from rich.table import Table

    table = Table(title="Student (nothing has been run)", title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for column in ("student", "teacher", "student / teacher"):
        table.add_column(column, justify="right")
    theirs = {} if found.teacher is None else asdict(found.teacher)
    ratios = found.ratios() or {}
    for name, value in asdict(found.student).items():
        ratio = f"{ratios[name]:.3f}" if name in ratios else "-"
        table.add_row(_NAMES[name], _text(value), _text(theirs.get(name)), ratio)
    return table


def _text(value: int | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,}"
