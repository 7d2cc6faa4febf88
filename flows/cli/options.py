"""Arguments that several commands share, and what they open: a recipe with its store, or a store alone."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flows.cli.console import Display
    from kd_core.recipe import Recipe
    from kd_core.store import Store

__all__ = [
    "DEFAULT_REGION",
    "DEFAULT_STORE",
    "HELP",
    "AsJson",
    "Endpoint",
    "Overrides",
    "RecipeFile",
    "Region",
    "StoreUri",
    "open_recipe",
    "open_store_alone",
    "print_json",
]

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, for example recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field: --set training.steps=300. May be repeated. VALUE is one YAML 1.2 value: a number, true, null (or "
        "nothing), a list [1, 2], a mapping {kind: dense}, or text, whole with every # and ':'; quote text that looks like another.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output and nothing else.")]
StoreUri = Annotated[str, typer.Option("--store", metavar="URI", help="A local directory, or s3://bucket/prefix.")]
Endpoint = Annotated[str | None, typer.Option("--s3-endpoint", metavar="URL", help="Address of an S3-compatible server; AWS without it.")]
Region = Annotated[str, typer.Option("--s3-region", help="Region of the bucket.")]

DEFAULT_STORE, DEFAULT_REGION = ".kd/store", "us-east-1"
HELP = {"help_option_names": ["-h", "--help"]}


def open_recipe(recipe_file: str, overrides: list[str], shown: "Display") -> tuple["Recipe", "Store"]:
    """Read a recipe and reach its store, saying so before the packages for it are imported."""
    shown.step(f"reading {recipe_file}")
    from flows.registry import with_registry
    from kd_core.recipe.files import load_recipe

    recipe = with_registry(load_recipe(recipe_file, overrides))
    shown.step(f"opening {recipe.run.store}")
    from kd_core.store import open_store

    return recipe, open_store(recipe.run.store, recipe.run.s3)


def open_store_alone(uri: str, endpoint: str | None, region: str, shown: "Display") -> "Store":
    """Reach a store that must be there.

    Raises:
        StoreAccessError: it is not, or cannot be reached.
    """
    shown.step(f"opening {uri}")
    from kd_core.errors import StoreAccessError
    from kd_core.recipe import S3Options
    from kd_core.recipe.addresses import check_address
    from kd_core.store import open_store

    if "://" not in uri:
        try:
            Path(uri).stat()
        except OSError as error:
            advice = "name one with --store (a recipe's is its run.store), or run a recipe first"
            raise StoreAccessError(f"no store at {Path(uri).absolute()}: {advice} ({error.strerror})") from error
    if endpoint is not None:
        check_address(endpoint, field="--s3-endpoint", instead="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return open_store(uri, S3Options(endpoint=endpoint, region=region))


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=1))
