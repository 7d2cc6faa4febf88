"""``kd cache ...``: the cache of the teacher's work, looked into and looked after. Shows what kd_core.cache finds; owns no logic.

Every command takes the store itself (``--store``), not a recipe: one cache serves many recipes. What changes a store
(``repair``, ``gc``) shows its plan and does nothing without ``--yes``.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import Display, display, human_bytes
from flows.cli.options import DEFAULT_REGION, DEFAULT_STORE, HELP, AsJson, Endpoint, Region, StoreUri, open_store_alone, print_json
from flows.cli.row_output import print_rows
from flows.cli.terminal import say

if TYPE_CHECKING:
    import pyarrow as pa

    from kd_core.cache.parity import Parity
    from kd_core.store import Store

__all__ = ["cache_app"]

cache_app = typer.Typer(
    name="cache",
    help="Look into the cache of the teacher's work, and look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)

Yes = Annotated[bool, typer.Option("--yes", help="Do it. Without this the plan is shown and nothing is changed.")]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


def _seconds(text: str) -> float:
    """A duration as people write it.

    >>> _seconds("7d"), _seconds("1.5h"), _seconds("0")
    (604800.0, 5400.0, 0.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", text.strip())
    if found is None or (found[2] == "" and float(found[1]) != 0):
        raise typer.BadParameter(f"{text!r} is no duration; write a number with s, m, h, d or w, for example 7d")
    return float(found[1]) * _UNITS.get(found[2], 1.0)


def _share(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise typer.BadParameter(f"{value:g} is no share; use a number above 0 and at most 1")
    return value


# ---------------------------------------------------------------------------------------------- looking


@cache_app.command("sql")
def sql_command(
    statement: Annotated[
        str, typer.Argument(metavar="SQL", help="One SELECT on soft_labels, answers, hidden_states, commits, namespaces.")
    ],
    store_uri: StoreUri = DEFAULT_STORE,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header line.")] = False,
) -> None:
    """Ask the cache in SQL, where it lies. Only the columns asked for are read.

    kd cache sql "SELECT source, avg(mean_entropy) FROM soft_labels GROUP BY source"
    """
    with display(quiet=as_json or as_csv) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("asking")
        from kd_core.cache.query import sql
    try:
        with sql(store, statement) as answer:
            print_rows(answer.columns, answer.rows, "json" if as_json else "csv" if as_csv else "table")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SQL") from error


@cache_app.command()
def explode(
    store_uri: StoreUri = DEFAULT_STORE,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NS", help="First digits of a soft-label namespace.")] = None,
    key: Annotated[list[str], typer.Option("--key", metavar="KEY", help="A row's key. May be repeated.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="K", help="At most so many rows of the cache.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A .parquet or .csv file; the screen without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show soft labels as plain rows: key, position, token, probability."""
    if out is not None and out.suffix not in (".parquet", ".csv"):
        raise typer.BadParameter(f"{out}: write to a name that ends in .parquet or .csv", param_hint="--out")
    with display(quiet=as_json) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("reading soft labels")
        from kd_core.cache.catalog import find_namespace
        from kd_core.cache.explode import EXPLODED_SCHEMA
        from kd_core.cache.explode import explode as exploded

        found = find_namespace(store, namespace, table="soft_labels")
    tables = exploded(found.cache, found.snapshot, keys=set(key) if key else None, limit=limit)
    if out is None:
        rows = (tuple(row.values()) for table in tables for row in table.to_pylist())
        return print_rows(EXPLODED_SCHEMA.names, rows, "json" if as_json else "table")
    num_rows = _write_exploded(out, tables)
    if as_json:
        return print_json({"file": str(out), "rows": num_rows, "bytes": out.stat().st_size})
    say(f"Written: {out} ({num_rows:,} rows, {human_bytes(out.stat().st_size)})")


def _write_exploded(out: Path, tables: "Iterator[pa.Table]") -> int:
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    from kd_core.cache.explode import EXPLODED_SCHEMA

    count = 0
    opened = pq.ParquetWriter(out, EXPLODED_SCHEMA, compression="zstd") if out.suffix == ".parquet" else pc.CSVWriter(out, EXPLODED_SCHEMA)
    with opened as writer:
        for table in tables:
            writer.write_table(table)
            count += table.num_rows
    return count


@cache_app.command("ls")
def list_command(
    store_uri: StoreUri = DEFAULT_STORE, endpoint: Endpoint = None, region: Region = DEFAULT_REGION, as_json: AsJson = False
) -> None:
    """List the row stores: whose they are, which recipes use them, rows, tokens, bytes, age.

    Recipes are those that came to a report in this store.
    """
    with display(quiet=as_json) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("reading commits and reports")
        from kd_core.cache.contents import reported, row_stores

        rows = row_stores(store, reported(store), now_seconds=time.time())
    if as_json:
        return print_json({"store": store.uri, "namespaces": rows})
    from flows.cli.cache_tables import namespaces_table
    from flows.cli.tables import show

    show(namespaces_table(rows, store.uri))


@cache_app.command()
def stats(
    namespace: Annotated[
        str | None, typer.Argument(metavar="[NS]", help="First digits of a namespace; not needed if there is one.")
    ] = None,
    store_uri: StoreUri = DEFAULT_STORE,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    as_json: AsJson = False,
) -> None:
    """Figures of one row table: bytes a token by part, entropies, finish reasons, duplicate rows, orphan shards."""
    from dataclasses import asdict

    with display(quiet=as_json) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("reading footers")
        from kd_core.cache.catalog import find_namespace
        from kd_core.cache.figures import figures

        found = find_namespace(store, namespace, table=None)
        numbers = figures(found, tick=shown.work("stats"))
    about = {"namespace": found.cache.namespace, "table": found.cache.table, "teacher": found.teacher, "policy": found.policy}
    if as_json:
        return print_json({**about, **asdict(numbers)})
    from flows.cli.cache_tables import bytes_table, counts_table, entropy_table
    from flows.cli.tables import show

    show("\n".join(f"{name:<9} {value}" for name, value in about.items() if value))
    tables = [bytes_table(numbers), entropy_table(numbers) if numbers.entropy else None]
    tables.append(counts_table("Finish reasons", numbers.finish_reasons) if numbers.finish_reasons else None)
    unused = {"duplicate rows": numbers.duplicate_rows, "orphan shards": numbers.orphan_shards}
    for table in (*tables, counts_table("Not read by anyone", unused)):
        if table is not None:
            say("")
            show(table)


# ---------------------------------------------------------------------------------------------- looking after


@cache_app.command()
def verify(
    store_uri: StoreUri = DEFAULT_STORE,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    sample: Annotated[float, typer.Option("--sample", metavar="F", callback=_share, help="Share of the shards to read, drawn anew.")] = 1.0,
    live: Annotated[str | None, typer.Option("--live", metavar="RECIPE", help="Also score rows again with this recipe's teacher.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="K", help="Rows to score again.")] = 16,
    overrides: Annotated[list[str], typer.Option("--set", metavar="PATH=VALUE", help="Change a field of the recipe of --live.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check every byte and row, or a sample. Exit code 1 names what is damaged."""
    from dataclasses import asdict

    with display(quiet=as_json) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("checking every byte" if sample == 1.0 else f"checking {sample:.0%} of the shards")
        from kd_core.cache.verify import verify as verified

        found = verified(store, sample=sample, tick=shown.work("verify"))
        parity = None if live is None else _parity(live, overrides, store, rows, shown)
    if as_json:
        compared = None if parity is None else {**asdict(parity), "holds": parity.holds}
        print_json({"store": store.uri, **asdict(found), "live": compared})
    else:
        from flows.cli.cache_tables import damage_text, parity_table
        from flows.cli.tables import show

        if found.damage:
            say(damage_text(found, store.uri))
        what = (
            f"{found.shards:,} of {found.commits:,} shards ({found.rows:,} rows), {found.artifacts:,} of {found.records:,} artifacts, "
            f"{found.entries:,} ledger entries and {found.checkpoints:,} checkpoints were read"
        )
        say(
            f"{what}; {len(found.damage)} damaged or gone. Put aside what is damaged with: kd cache repair --yes; then run the recipe again"
            if found.damage
            else f"{what}; all is as committed."
        )
        if parity is not None:
            show(parity_table(parity))
            say(_PARITY_HOLDS if parity.holds else _PARITY_FAILS)
    raise typer.Exit(1 if found.damage or (parity is not None and not parity.holds) else 0)


_PARITY_HOLDS = "The live teacher is the teacher that made these labels."
_PARITY_FAILS = (
    "The live teacher is not the one that made these labels, as it runs here: use the packages and the device that made them, "
    "or delete the namespace to have it computed again."
)


def _parity(recipe_file: str, overrides: list[str], store: "Store", rows: int, shown: Display) -> "Parity":
    shown.step(f"loading the teacher of {recipe_file}")
    from kd_core.cache.parity import live_parity
    from kd_core.recipe.files import load_recipe

    return live_parity(load_recipe(recipe_file, overrides), store, num_rows=rows, tick=shown.work("live teacher"))


@cache_app.command()
def repair(
    store_uri: StoreUri = DEFAULT_STORE,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Put damaged objects aside, so that the next run computes their rows again."""
    from dataclasses import asdict

    with display(quiet=as_json) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("checking every byte")
        from kd_core.cache.repair import plan_repair
        from kd_core.cache.repair import repair as repaired
        from kd_core.cache.verify import verify as verified

        moves = plan_repair(store, verified(store, tick=shown.work("verify")).damage)
        if yes:
            repaired(store, moves, tick=shown.work("repair"))
    if as_json:
        return print_json({"store": store.uri, "done": yes, "moves": [asdict(move) for move in moves]})
    from flows.cli.cache_tables import repair_text

    if not moves:
        return say("Nothing is damaged.")
    say(repair_text(moves, store.uri, done=yes))
    say("Run the recipe again to compute the lost rows." if yes else "Nothing was changed; do it with --yes.")


@cache_app.command()
def gc(
    store_uri: StoreUri = DEFAULT_STORE,
    endpoint: Endpoint = None,
    region: Region = DEFAULT_REGION,
    grace: Annotated[str, typer.Option("--grace", metavar="DURATION", help="Keep what is younger: 7d, 36h, 30m.")] = "7d",
    unused: Annotated[bool, typer.Option("--namespaces", help="Also row tables that no record in the store names.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no commit and no record reaches, once it is old enough."""
    from dataclasses import asdict

    grace_seconds = _seconds(grace)
    with display(quiet=as_json) as shown:
        store = open_store_alone(store_uri, endpoint, region, shown)
        shown.step("looking for what nothing reaches")
        from kd_core.cache.garbage import collect, plan_collection

        tick = shown.work("gc")
        found = plan_collection(store, grace_seconds=grace_seconds, now_seconds=time.time(), unused_namespaces=unused)
        if yes:
            collect(store, found, tick=tick)
    size = sum(item.size_bytes for item in found)
    if as_json:
        return print_json({"store": store.uri, "done": yes, "bytes": size, "objects": [asdict(item) for item in found]})
    from flows.cli.cache_tables import garbage_text

    if not found:
        return say(f"Nothing to delete in {store.uri}: everything is reached, or younger than {grace}.")
    say(garbage_text(found, store.uri, done=yes))
    say(f"{len(found):,} objects, {human_bytes(size)} {'were deleted.' if yes else 'would be deleted; do it with --yes.'}")
