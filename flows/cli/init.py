"""``kd init``: a first recipe from somebody's data. Says what was recognised and why, writes the file, and shows its plan."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flows.cli.terminal import say
from kd_core.errors import KDError, RecipeError

if TYPE_CHECKING:
    from kd_core.first_recipe import Recognised, Sample

__all__ = ["init"]

_T = TypeVar("_T")
_LONG_SECONDS = 3600.0


def init(
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="A file, a glob (.jsonl, .json, .csv, .tsv, .parquet; .gz, .zst), a folder of a folder of images a class, or a hub id.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="A hub id, a directory, pkg://package/file.gguf, or a server: http://host:8000/v1; of classes none is needed.",
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student", metavar="MODEL", help="1/2, 1/3 ...: a share of the teacher's blocks (default 1/2); or a model like --teacher."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The recipe to write; never one that is there.")] = Path("recipe.yaml"),
) -> None:
    """Write a first recipe for your data, and show its plan. Asks for what it is not told."""
    from kd_core.first_recipe import SCHEMA_FILE, class_student_of, class_teacher_of, look_at, recognise, write_recipe
    from kd_core.recipe.core_yaml import read_yaml
    from kd_core.recipe.files import parse_recipe
    from kd_core.recipe.schema import recipe_schema

    if out.exists():
        raise RecipeError(f"{out} is there already, and is not overwritten; remove it, or name another with --out")
    folder = out.parent
    if not folder.is_dir():
        raise RecipeError(f"--out: there is no folder {str(folder)!r}; make it first")
    if data is None:
        _expect_terminal("--data" if teacher is not None else "--data and --teacher")
    sample = _told(data, "Your data: a file, a glob, a folder of images, or a hub id", lambda word: look_at(word, folder=folder))
    found = recognise(sample)
    _explain(sample, found)
    if found.task.get("kind") == "classification":
        who = class_teacher_of(teacher, image_edge=sample.image_edge, folder=folder)
        learner = class_student_of(student, image_edge=sample.image_edge, folder=folder)
    else:
        who, learner = _models(teacher, student, folder, asked=data is None or teacher is None)
    text = write_recipe(sample, found, teacher=who, student=learner, file=str(out))
    parse_recipe(read_yaml(text, str(out)), origin=str(out))
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
        schema = folder / SCHEMA_FILE
        schema.parent.mkdir(parents=True, exist_ok=True)
        schema.write_text(json.dumps(recipe_schema(), indent=1), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error.strerror}); name another with --out") from error
    say(f"\n{text}")
    try:
        _show_plan(out)
    except KDError:
        out.unlink()  # what cannot be planned is not left behind
        raise


def _expect_terminal(missing: str) -> None:
    if not sys.stdin.isatty():
        raise RecipeError(f"kd init asks for what it is not told, and there is no terminal to ask on; give {missing} (kd init --help)")


def _models(teacher: str | None, student: str | None, folder: Path, *, asked: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the teacher and of the student of a recipe whose student writes text."""
    from kd_core.first_recipe import student_of, teacher_of

    if teacher is None:
        _expect_terminal("--teacher")
    who = _told(teacher, "The teacher: a hub id, a directory, or a server's address", lambda word: teacher_of(word, folder=folder))
    default = None if who["kind"] == "server" else "1/2"
    if student is None and default is None and not asked:
        raise RecipeError("--student: a server's model has no blocks to give here; name a model, such as a hub id or a directory")
    question = "The student: 1/2, 1/3 ... of the teacher's blocks, or a model"
    given = student if student is not None or asked else default
    return who, _told(given, question, lambda word: student_of(word, teacher=who, folder=folder), default=default)


def _told(word: str | None, question: str, read: Callable[[str], _T], *, default: str | None = None) -> _T:
    """What a flag says, or an answer on the terminal, asked for until it can be used."""
    if word is not None:
        return read(word)
    from rich.prompt import Prompt

    while True:
        answer = Prompt.ask(question, default=default) if default else Prompt.ask(question)
        try:
            return read((answer or "").strip())
        except KDError as error:
            say(error)


def _explain(sample: "Sample", found: "Recognised") -> None:
    say("Looked at a folder of images, one folder a class:" if sample.image_edge is not None else f"Looked at {len(sample.rows)} rows:")
    for name, value in {**found.fields, **found.task}.items():
        say(f"  {name}: {value!r}{f' ({why})' if (why := found.why.get(name)) else ''}")
    if sample.image_edge is None and not {"gold", "messages"} & found.fields.keys():
        say("  no gold answers: the student learns from the teacher's own")
    if not found.task:
        say("  answers are not verified: nothing says which part of one is final")
    if found.unused:
        say(f"  not used: {', '.join(found.unused)}")


def _show_plan(out: Path) -> None:
    from flows.cli.tables import plan_table, show
    from flows.registry import with_registry
    from kd_core.planning.plan import make_plan
    from kd_core.recipe.files import load_recipe, what_is_filled_in
    from kd_core.store import open_store

    recipe = with_registry(load_recipe(out))
    plan = make_plan(recipe, open_store(recipe.run.store, recipe.run.s3))
    show(plan_table(plan, what_is_filled_in(out)))
    if plan.total.seconds > _LONG_SECONDS:
        few = "--set prompts.sources.0.limit=200 --set training.steps=20 --set seeds=[0,1]"
        say(f"A first try with few rows and steps:  kd run {out} {few}")
    say(f"Written: {out}. Then:  kd run {out}")
