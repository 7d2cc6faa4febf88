"""The command line ``kd``. It stands on top of everything and owns no logic: it loads a recipe, calls, and shows.

Imports are inside the commands, so that ``kd --help`` and a run in which everything is done start fast.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.cache import cache_app
from flows.cli.chat import chat
from flows.cli.console import display
from flows.cli.export import export
from flows.cli.init import init
from flows.cli.options import HELP, AsJson, Overrides, RecipeFile, open_recipe, print_json
from flows.cli.recipes import recipes
from flows.cli.schema import schema
from flows.cli.status import status
from flows.cli.student import student_app
from flows.cli.terminal import say
from kd_core import __version__

__all__ = ["app"]

app = typer.Typer(
    name="kd",
    help="A recipe goes in, a promoted student with its evidence comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)

Home = Annotated[Path, typer.Option("--home", help="Folder that holds all state of the local servers.")]

_HOME = Path(".kd/stack")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kd {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """A recipe goes in, a promoted student with its evidence comes out."""


app.command()(init)
app.command()(recipes)


@app.command()
def plan(recipe_file: RecipeFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show what a run would compute, find, store and cost, and what would fail. Writes nothing.

    Exit code 2 where a run would fail.
    """
    with display(quiet=as_json) as shown:
        shown.step(f"reading {recipe_file}")
        from flows.registry import with_registry
        from kd_core.recipe.files import load_recipe, what_is_filled_in

        recipe, filled = with_registry(load_recipe(recipe_file, overrides)), what_is_filled_in(recipe_file, overrides)
        shown.step(f"reading the sources of {recipe.name}, and what {recipe.run.store} holds of it")
        from kd_core.planning.faults import look_ahead, outlook_json

        found = look_ahead(recipe, prefect_url=os.environ.get("PREFECT_API_URL"))
    if as_json:
        print_json({"filled_in": filled, **outlook_json(found)})
    else:
        from flows.cli.tables import plan_table, show

        if found.plan is not None:
            show(plan_table(found.plan, filled))
        for fault in found.faults:
            say(f"will fail: {fault}")
    raise typer.Exit(2 if found.faults else 0)


@app.command()
def run(
    recipe_file: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    local: Annotated[bool, typer.Option("--local", help="In this process, without Prefect.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe to its end. Whatever is done already is not done again."""
    with display(quiet=as_json) as shown:
        from flows.cli.launched import as_launched

        if (found := as_launched(overrides)) is None:
            return
        overrides = found
        recipe, store = open_recipe(recipe_file, overrides, shown)
        shown.step(f"reading the sources of {recipe.name}, and what {recipe.run.store} holds of it")
        from kd_core.stages.graph import build_graph
        from kd_core.stages.order import when_all_done

        nodes = build_graph(recipe, store)
        server = os.environ.get("PREFECT_API_URL")
        done = when_all_done(recipe, store, nodes) if local or server is None else None
        if done is not None:  # found before a temporary server is started; one that is up keeps a record of the run
            for name, artifact in done.items():
                shown.done(name, artifact)
        elif local:
            shown.step("importing what the work needs")
            from flows.local import run_local

            done = run_local(recipe, store, nodes, shown)
        else:
            shown.step(f"telling the Prefect server {server}" if server else "starting a Prefect server for this run (--local needs none)")
            from flows.orchestrated import run_with_prefect
            from kd_core.recipe.files import load_recipe

            # as it is written: a resolved registry address may hold a password, and Prefect keeps parameters
            done = run_with_prefect(load_recipe(recipe_file, overrides), shown)
    from flows.cli.results import outcome, outcome_screen, report_command

    if as_json:
        return print_json(outcome(recipe, store, done))
    from flows.cli.tables import show

    show(outcome_screen(recipe, store, done, recipe_file))
    say(f"Full report:  {report_command(recipe_file, overrides)}")


app.command()(status)


@app.command()
def report(
    recipe_file: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown to standard output and nothing else.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for report.html, .md and .json; default reports/<recipe>.")
    ] = None,
) -> None:
    """Show the report of a finished run, and write it to files.

    For people, on a terminal and in a pipe alike; --markdown and --json print the other forms, and write no files.
    """
    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown are two forms; ask for one")
    with display(quiet=as_json or as_markdown) as shown:
        recipe, store = open_recipe(recipe_file, overrides, shown)
        shown.step(f"reading the report of {recipe.name}")
        from flows.cli.results import report_files, write_report

        files = report_files(recipe, store, recipe_file)
    if as_json or as_markdown:
        return print(files["report.json" if as_json else "report.md"].decode().rstrip("\n"))
    from flows.cli.report import report_screen
    from flows.cli.tables import show

    written = write_report(files, output or Path("reports") / recipe.name)
    show(report_screen(files["report.json"]))
    say(f"\nWritten: {written / 'report.html'} (open it in a browser), .md and .json")


@app.command()
def doctor(recipe_file: RecipeFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Check a recipe and its models for the known ways in which distillation goes silently wrong."""
    from dataclasses import asdict

    with display(quiet=as_json) as shown:
        recipe, store = open_recipe(recipe_file, overrides, shown)
        shown.step(f"reading the sources and models of {recipe.name}")
        from kd_core.doctor import examine

        findings = examine(recipe, store, tick=shown.work("doctor"))
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        from flows.cli.tables import doctor_table, show

        show(doctor_table(findings))
    raise typer.Exit(1 if any(finding.status == "failed" for finding in findings) else 0)


app.command()(chat)
app.command()(export)
app.command()(schema)
app.add_typer(student_app)
app.add_typer(cache_app)


@app.command()
def up(home: Home = _HOME, as_json: AsJson = False) -> None:
    """Start Prefect, MLflow, an S3 server and a worker as local processes, and deploy ./prefect.yaml, or without one ours."""
    with display(quiet=as_json) as shown:
        shown.step(f"starting servers with their state in {home}")
    from flows.deployments import deployments_file
    from infra.stack import deploy
    from infra.stack import up as start

    tell = (lambda text: None) if as_json else (lambda text: say(text, file=sys.stderr))
    info = start(home, say=tell)
    deploy(info, deployments_file())
    from flows.cli.tables import stack_json, stack_text

    if as_json:
        return print_json(stack_json(info))
    say(stack_text(info))


@app.command()
def down(home: Home = _HOME, as_json: AsJson = False) -> None:
    """Stop everything that kd up started. The state stays in its folder."""
    with display(quiet=as_json) as shown:
        shown.step(f"stopping what runs from {home}")
        from infra.stack import down as stop

        stopped = stop(home)
    if as_json:
        return print_json({"stopped": stopped})
    say(f"Stopped: {', '.join(stopped)}" if stopped else f"Nothing was running from {home}")
