"""Faults that a run would meet, found before anything is paid: one line each, with what to do.

Sources are read, the store, the registry, the orchestrator and a server teacher are asked. What is done already needs none of them, and
is not asked for. A fault is no error: all of them are found at once.
"""

import base64
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import RecipeError, SourceError, StoreError, TeacherError
from kd_core.planning.known import Known
from kd_core.planning.plan import Plan, plan_json, plan_of, read_known
from kd_core.planning.reachable import refusal, unreachable, unwritable
from kd_core.prompts.cleaning import clean
from kd_core.prompts.sources import read_source
from kd_core.recipe import ClassificationTask, Recipe, ServerTeacher, TrainedTeacher
from kd_core.recipe.addresses import redact_url
from kd_core.store import open_store

__all__ = ["Outlook", "look_ahead", "outlook_json"]

_SAMPLED_ROWS = 2000
"""Rows of each of the teacher's own sources whose characters are looked at; a character that is rarer is met by the teacher's stage,
which comes first and has nothing to lose."""
_NOTHING: dict[str, Any] = {"stages": [], "total": None, "soft_label_options": [], "notes": []}


@dataclass(frozen=True)
class Outlook:
    """A plan, and why the run would fail.

    Attributes:
        plan: None where there is none to make: what it would be made of is at fault.
        faults: one line each; empty where none was found.
    """

    plan: Plan | None
    faults: tuple[str, ...]


def outlook_json(found: Outlook) -> dict[str, Any]:
    """Turn an outlook into plain data: the plan's, empty where there is none, and "faults"."""
    return {**(_NOTHING if found.plan is None else plan_json(found.plan)), "faults": list(found.faults)}


def look_ahead(recipe: Recipe, *, prefect_url: str | None) -> Outlook:
    """Plan a recipe and find its faults.

    Args:
        recipe: with the address of its registry written out.
        prefect_url: address of the orchestrator's API, if one is configured.

    Raises:
        IntegrityError: the store holds a damaged record.
        VersionError: the store holds a record or commit of another version.
        StoreError: a store that was reached fails.
    """
    try:
        store = open_store(recipe.run.store, recipe.run.s3)
    except StoreError as error:
        return Outlook(None, (*_lines(error), *_places(recipe, None, prefect_url)))
    try:
        known = read_known(recipe, store)
        plan = plan_of(known)
        missing = {name for name, record in known.basis.records.items() if record is None}
        return Outlook(plan, (*_places(recipe, missing, prefect_url), *_families(recipe, missing), *_characters(known, missing)))
    except (RecipeError, SourceError, TeacherError) as error:
        return Outlook(None, (*_lines(error), *_places(recipe, None, prefect_url)))


def _lines(error: Exception) -> list[str]:
    return str(error).splitlines()


def _places(recipe: Recipe, missing: Collection[str] | None, prefect_url: str | None) -> Iterator[str]:
    """Faults of the places that a run needs. ``missing`` names the nodes that are not done; None is all."""
    run = recipe.run
    if (missing is None or missing) and "://" not in run.store and (reason := unwritable(Path(run.store))) is not None:
        yield f"store {run.store!r} cannot be written ({reason}); give this user the right to, or name another with --set run.store=..."
    if (missing is None or "publish" in missing) and run.tracking is not None and (reason := _registry(run.tracking)) is not None:
        yield (
            f"MLflow at {redact_url(run.tracking)} cannot be used ({reason}); start it (kd up), or name another with "
            "--set run.tracking=sqlite:///.kd/mlflow.db"
        )
    if prefect_url is not None and (reason := refusal(f"{prefect_url.rstrip('/')}/health", headers=_prefect_key())) is not None:
        yield f"Prefect at {redact_url(prefect_url)} cannot be used ({reason}); start it (kd up), unset PREFECT_API_URL, or use --local"
    if (missing is None or "answers" in missing) and isinstance(recipe.teacher, ServerTeacher):
        yield from _server(recipe)


def _registry(uri: str) -> str | None:
    """Why a registry cannot be used; None where it can, as far as can be told without MLflow."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return refusal(f"{uri.rstrip('/')}/health", headers={})
    if parts.scheme != "sqlite":
        return unreachable(uri)
    file = Path(parts.path.removeprefix("/"))
    if file.exists() and not os.access(file, os.W_OK):
        return f"{file}: Permission denied"
    return unwritable(file.parent)


def _prefect_key() -> dict[str, str]:
    if secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    key = os.environ.get("PREFECT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _server(recipe: Recipe) -> Iterator[str]:
    from kd_core.teacher.server import API_KEY_VARIABLE

    url, key = recipe.run.teacher_url, os.environ.get(API_KEY_VARIABLE)
    if url is None:
        yield "run.teacher_url: a server teacher needs its address; add --set run.teacher_url=http://host:port/v1"
    elif (reason := refusal(f"{url.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"} if key else {})) is not None:
        yield (
            f"the teacher at {redact_url(url)} does not answer ({reason}); start the server, set {API_KEY_VARIABLE}, or name another "
            "with --set run.teacher_url=..."
        )


def _families(recipe: Recipe, missing: Collection[str]) -> Iterator[str]:
    """Fault of a new classifier that transformers cannot make."""
    if not isinstance(recipe.task, ClassificationTask) or not any(name == "teacher" or name.startswith("student.") for name in missing):
        return
    from kd_core.teacher.classifiers import check_families  # with transformers: seconds that only such a recipe pays

    try:
        check_families(recipe)
    except RecipeError as error:
        yield str(error)


def _characters(known: Known, missing: Collection[str]) -> Iterator[str]:
    """Fault of a tokenizer of single characters that lacks some of the data's."""
    teacher = known.basis.recipe.teacher
    if not isinstance(teacher, TrainedTeacher) or set(missing) <= {"gate", "report", "publish"}:
        return
    lacking: dict[str, str] = {}
    for text in _texts(known, teacher, own="teacher" in missing):
        for character in set(text).difference(teacher.tokenizer.alphabet, lacking):
            lacking[character] = text
    if lacking:
        shown = ", ".join(map(repr, sorted(lacking)))
        yield (
            f"teacher.tokenizer.alphabet lacks {len(lacking)} of the data's characters: {shown} (one is in "
            f"{next(iter(lacking.values()))[:60]!r}); add them to it, or leave such rows out"
        )


def _texts(known: Known, teacher: TrainedTeacher, *, own: bool) -> Iterator[str]:
    """Texts that will be written in tokens: prompts and gold answers, of suites too, and if wanted of the teacher's own sources."""
    prompts = known.counts.prompts
    if prompts.table is not None:
        yield from _filled(prompts.table.filter(pc.not_equal(prompts.table["split"], "test")))
    for suite in prompts.suites.values():
        yield from _filled(suite)
    for i, source in enumerate(teacher.sources if own else ()):
        rows = islice(read_source(source, where=f"teacher.sources.{i}", s3=known.basis.recipe.run.s3), _SAMPLED_ROWS)
        yield from (clean(text) for _, row in rows if row.prompt and row.gold for text in (*row.prompt_texts, row.gold))


def _filled(table: pa.Table) -> Iterator[str]:
    for name in ("prompt", "gold"):
        yield from (text for text in table[name].to_pylist() if text is not None)
