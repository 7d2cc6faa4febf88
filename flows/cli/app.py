"""The command line ``kd``. It stands on top of everything and owns no logic: it loads a recipe, calls, and shows.

Exit codes: 0 done, 1 failed (or a doctor's finding), 2 bad input. Imports are inside the commands, so that ``kd --help``
and a run in which everything is done start fast.
"""

import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from flows.cli.cache import cache_app
from flows.cli.export import export
from flows.cli.init import init
from flows.cli.recipes import recipes
from flows.cli.schema import schema
from flows.cli.student import student_app
from flows.cli.terminal import say
from kd_core.errors import KDError, RecipeError

if TYPE_CHECKING:
    from kd_core.recipe import Recipe
    from kd_core.store import Store

__all__ = ["app", "main"]

app = typer.Typer(
    name="kd",
    help="A recipe goes in, a promoted student with its evidence comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app)
app.add_typer(student_app)
app.command()(init)
app.command()(export)
app.command()(recipes)
app.command()(schema)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or a shipped one's name (kd recipes).")]
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
Home = Annotated[Path, typer.Option("--home", help="Folder that holds all state of the local servers.")]

_HOME = Path(".kd/stack")
_INTERRUPTED = 130
_TELLERS = ("kd_core.stages.run", "kd_core.stages.answers", "kd_core.teacher.server", "kd_core.store.sealed", "kd_core.train.checkpoints")
"""Loggers whose warnings are shown: what was healed, passed over or left out."""


def main() -> None:
    """Entry point: errors become one line and an exit code, never a traceback."""
    _settle_environment()
    logging.getLogger("kd_core").addHandler(logging.NullHandler())  # a try that failed shows only in the error that ends them all
    for name in _TELLERS:
        logging.getLogger(name).handlers = [_Warnings(logging.WARNING)]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns an interrupt into this exit code
            raise KeyboardInterrupt
    except RecipeError as error:
        _fail(error, 2)
    except KDError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail(f"stopped. Everything that was finished is kept; go on with:  {shlex.join(['kd', *sys.argv[1:]])}", _INTERRUPTED)
    except TyperException as error:  # wrong usage of the command line
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(f"{text}  (kd --help shows what there is)", 2)
    except Exception as error:
        _unexpected(error)
    sys.exit(code if isinstance(code, int) else 0)


class _Warnings(logging.Handler):
    """One line each, to whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        say(f"kd: {record.getMessage()}", file=sys.stderr)


def _settle_environment() -> None:
    """Quiet, offline-friendly defaults for libraries; whatever the user has set stays."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "svg",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: object, code: int) -> NoReturn:
    say(f"kd: {message}", file=sys.stderr)
    sys.exit(code)


def _unexpected(error: Exception) -> NoReturn:
    """A defect of ours, or of the machine: one line, with the traceback in a file."""
    import traceback

    from kd_core.store.local import make_directory

    log = Path(".kd/last-error.log")
    make_directory(log.parent)
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    _fail(f"{type(error).__name__}: {error}\nThis is a defect or a broken machine, not your recipe; the traceback is in {log}", 1)


def _open(recipe_file: str, overrides: list[str]) -> tuple["Recipe", "Store"]:
    from flows.registry import with_registry
    from kd_core.recipe.files import load_recipe
    from kd_core.store import open_store

    recipe = with_registry(load_recipe(recipe_file, overrides))
    return recipe, open_store(recipe.run.store, recipe.run.s3)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


@app.command()
def plan(recipe_file: RecipeFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show what a run would compute, find, store and cost. Writes nothing."""
    from kd_core.planning.plan import make_plan, plan_json
    from kd_core.recipe.files import what_is_filled_in

    recipe, store = _open(recipe_file, overrides)
    filled, found = what_is_filled_in(recipe_file, overrides), make_plan(recipe, store)
    if as_json:
        return _print_json({"filled_in": filled, **plan_json(found)})
    from flows.cli.tables import plan_table, show

    show(plan_table(found, filled))


@app.command()
def run(
    recipe_file: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    local: Annotated[bool, typer.Option("--local", help="In this process, without Prefect.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe to its end. Whatever is done already is not done again."""
    from flows.cli.console import display
    from flows.cli.launched import as_launched
    from kd_core.stages.graph import build_graph
    from kd_core.stages.order import when_all_done

    if (found := as_launched(overrides)) is None:
        return
    overrides = found
    recipe, store = _open(recipe_file, overrides)
    with display(quiet=as_json) as shown:
        nodes = build_graph(recipe, store)
        done = when_all_done(recipe, store, nodes) if local or "PREFECT_API_URL" not in os.environ else None
        if done is not None:  # found before a temporary server is started; one that is up keeps a record of the run
            for name, artifact in done.items():
                shown.done(name, artifact)
        elif local:
            from flows.local import run_local

            done = run_local(recipe, store, nodes, shown)
        else:
            from flows.orchestrated import run_with_prefect
            from kd_core.recipe.files import load_recipe

            # as it is written: a resolved registry address may hold a password, and Prefect keeps parameters
            done = run_with_prefect(load_recipe(recipe_file, overrides), shown)
    from flows.cli.results import outcome, outcome_text

    if as_json:
        return _print_json(outcome(recipe, store, done))
    say(outcome_text(recipe, store, done, recipe_file, overrides))


@app.command()
def status(recipe_file: RecipeFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show which parts of a recipe are done, and where training would resume."""
    from flows.cli.results import status_rows

    recipe, store = _open(recipe_file, overrides)
    rows = status_rows(recipe, store)
    if as_json:
        return _print_json({"store": store.uri, "nodes": rows})
    from flows.cli.tables import show, status_table

    show(status_table(rows, store.uri))


@app.command()
def report(
    recipe_file: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for report.html, .md and .json; default reports/<recipe>.")
    ] = None,
) -> None:
    """Show the report of a finished run, and write it to files."""
    from flows.cli.results import report_files
    from flows.cli.tables import show_markdown

    recipe, store = _open(recipe_file, overrides)
    files = report_files(recipe, store, recipe_file)
    if as_json:
        return print(files["report.json"].decode())
    folder = output or Path("reports") / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    show_markdown(files["report.md"].decode())
    say(f"Written: {folder / 'report.html'} (open it in a browser), {folder / 'report.md'}, {folder / 'report.json'}")


@app.command()
def doctor(recipe_file: RecipeFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Check a recipe and its models for the known ways in which distillation goes silently wrong."""
    from dataclasses import asdict

    from flows.cli.console import display
    from kd_core.doctor import examine

    recipe, store = _open(recipe_file, overrides)
    with display(quiet=as_json) as shown:
        findings = examine(recipe, store, tick=shown.work("doctor"))
    if as_json:
        _print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        from flows.cli.tables import doctor_table, show

        show(doctor_table(findings))
    raise typer.Exit(1 if any(finding.status == "failed" for finding in findings) else 0)


@app.command()
def up(home: Home = _HOME, as_json: AsJson = False) -> None:
    """Start Prefect, MLflow, an S3 server and a worker as local processes, and deploy ./prefect.yaml, or without one ours."""
    from flows.deployments import deployments_file
    from infra.stack import deploy
    from infra.stack import up as start

    tell = (lambda text: None) if as_json else (lambda text: say(text, file=sys.stderr))
    info = start(home, say=tell)
    deploy(info, deployments_file())
    from flows.cli.tables import stack_json, stack_text

    if as_json:
        return _print_json(stack_json(info))
    say(stack_text(info))


@app.command()
def down(home: Home = _HOME, as_json: AsJson = False) -> None:
    """Stop everything that kd up started. The state stays in its folder."""
    from infra.stack import down as stop

    stopped = stop(home)
    if as_json:
        return _print_json({"stopped": stopped})
    say(f"Stopped: {', '.join(stopped)}" if stopped else f"Nothing was running from {home}")
