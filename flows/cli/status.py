"""``kd status``: how far a recipe is, or without one what a store holds. Shows what the store says; owns no logic."""

import time
from typing import Annotated

import typer

from flows.cli.console import display, human_bytes
from flows.cli.options import DEFAULT_REGION, DEFAULT_STORE, AsJson, Endpoint, Overrides, Region, open_recipe, open_store_alone, print_json

__all__ = ["status"]


def status(
    recipe_file: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe's YAML file; a whole store without it.")] = None,
    overrides: Overrides = [],  # noqa: B006
    store_uri: Annotated[
        str | None,
        typer.Option("--store", metavar="URI", help=f"A store to look into, in place of {DEFAULT_STORE}, if no recipe is given."),
    ] = None,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a recipe are done, and where training would resume; without a recipe, what is in a store."""
    if recipe_file is not None and store_uri is not None:
        raise typer.BadParameter("a recipe names its store itself; change it with --set run.store=...", param_hint="--store")
    if recipe_file is None and overrides:
        raise typer.BadParameter("there is no recipe to change; name one", param_hint="--set")
    if recipe_file is None:
        return _whole_store(store_uri or DEFAULT_STORE, endpoint, region, as_json=as_json)
    with display(quiet=as_json) as shown:
        recipe, store = open_recipe(recipe_file, overrides, shown)
        shown.step(f"reading the sources of {recipe.name}, and what {recipe.run.store} holds of it")
        from flows.cli.results import status_rows

        rows = status_rows(recipe, store)
    if as_json:
        return print_json({"store": store.uri, "nodes": rows})
    from flows.cli.tables import show, status_table

    show(status_table(rows, store.uri))


def _whole_store(uri: str, endpoint: str | None, region: str, *, as_json: bool) -> None:
    with display(quiet=as_json) as shown:
        store = open_store_alone(uri, endpoint, region, shown)
        shown.step("reading reports and commits")
        from kd_core.cache.contents import recipe_rows, reported, row_stores, sizes

        now = time.time()
        found = reported(store)
        recipes, rows, parts = recipe_rows(found, now_seconds=now), row_stores(store, found, now_seconds=now), sizes(store)
    if as_json:
        return print_json({"store": store.uri, "recipes": recipes, "namespaces": rows, "sizes": parts})
    from flows.cli.cache_tables import namespaces_table, recipes_table
    from flows.cli.tables import show

    show(recipes_table(recipes, store.uri) if recipes else "No recipe has come to a report here yet.")
    if rows:
        show("")
        show(namespaces_table(rows, store.uri))
    size = sum(part["bytes"] for part in parts.values())
    each = ", ".join(f"{name} {human_bytes(part['bytes'])}" for name, part in parts.items())
    show(f"\n{human_bytes(size)} in all{': ' if each else ''}{each}")
