"""A finished or half-finished run, read from the store: outcome, status, report files."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from flows.cli.console import human_seconds
from flows.cli.report import measured, sizes, verdict
from kd_core.artifacts import Artifact, Record, check_sizes, find, read_bytes
from kd_core.errors import ArtifactError, RecipeError
from kd_core.recipe import Recipe
from kd_core.recipe.addresses import hide_passwords
from kd_core.stages.graph import build_graph
from kd_core.store import Store
from kd_core.summaries import GateSummary, PublishSummary, of
from kd_core.train.checkpoints import Checkpoints

__all__ = ["outcome", "outcome_screen", "report_command", "report_files", "status_rows", "write_report"]


def _record(recipe: Recipe, store: Store, name: str) -> Record | None:
    node = build_graph(recipe, store)[name]
    return find(store, node.stage, node.fingerprint)


def report_files(recipe: Recipe, store: Store, recipe_file: str) -> dict[str, bytes]:
    """Name -> bytes of the report's files, verified.

    Raises:
        ArtifactError: this recipe has not been run to its end in this store.
    """
    record = _record(recipe, store, "report")
    if record is None:
        raise ArtifactError(f"{recipe_file} has no report in {store.uri} yet; run it first: kd run {recipe_file}")
    return {file.name: read_bytes(store, record, file.name) for file in record.files}


def outcome(recipe: Recipe, store: Store, done: Mapping[str, Artifact]) -> dict[str, Any]:
    """The end of a run as plain data: verdict, publication, and each node with status and seconds."""
    nodes = [
        {
            "name": name,
            "fingerprint": a.fingerprint,
            "digest": a.digest,
            "status": "hit" if a.hit else "computed",
            "seconds": 0.0 if a.hit else a.seconds,
        }
        for name, a in done.items()
    ]
    gate, published = _record(recipe, store, "gate"), _record(recipe, store, "publish")
    assert gate is not None, "a run ends after the gate"
    assert published is not None, "a run ends after publication"
    judged = of(gate, GateSummary)
    return {
        "verdict": {"promote": judged.promote, "headline": judged.headline, "reasons": [asdict(reason) for reason in judged.reasons]},
        "published": asdict(of(published, PublishSummary)),
        "nodes": nodes,
    }


def outcome_screen(recipe: Recipe, store: Store, done: Mapping[str, Artifact], recipe_file: str) -> Group:
    """The end of a run: what was asked, found and decided, then the rules, main numbers, and what became of it."""
    report = json.loads(report_files(recipe, store, recipe_file)["report.json"])
    record = _record(recipe, store, "publish")
    assert record is not None, "a run ends after publication"
    published = of(record, PublishSummary)
    hits, spent = sum(a.hit for a in done.values()), sum(a.seconds for a in done.values() if not a.hit)
    used = ", ".join(f"{count:,} {what}" for what, count in report["counts"]["Rows learnt from"].items() if count)
    champion = "none" if published.champion_version is None else f"version {published.champion_version}"
    lines = [
        f"\n{used}",
        f"\nRegistered: {published.model} version {published.version}; champion: {champion}",
        f"in {hide_passwords(published.tracking)}",
        f"{hits} of {len(done)} nodes were done already; {human_seconds(spent)} of work.",
    ]
    return Group("", *verdict(report), *measured(report, without=("truncated",)), *sizes(report), *(Text(line) for line in lines))


def report_command(recipe_file: str, overrides: list[str]) -> str:
    """What shows the whole report of a run."""
    return shlex.join(["kd", "report", recipe_file, *(word for o in overrides for word in ("--set", o))])


def write_report(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write the report's files into a folder; returns it.

    Raises:
        RecipeError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise RecipeError(f"{folder}: the report cannot be written there ({error.strerror}); name another folder with --output") from error
    return folder


def status_rows(recipe: Recipe, store: Store) -> list[dict[str, Any]]:
    """One entry a node: name, fingerprint, status ('done', 'started', 'missing'), seconds, and the checkpoint step it would resume from.

    Raises:
        IntegrityError: a record is not readable as one or is another's, a file of a done node is gone or has another size, or the
            ledger has lost an entry.
    """
    begun = {info.key.split("/")[1] for info in store.list("checkpoints/")}
    rows = []
    for node in build_graph(recipe, store).values():
        record = find(store, node.stage, node.fingerprint)
        if record is not None:
            check_sizes(store, record)
        step = Checkpoints(store, node.fingerprint).newest_whole() if record is None and node.fingerprint in begun else None
        state = "done" if record is not None else "started" if step is not None else "missing"
        seconds = record.seconds if record is not None else None
        rows.append({"name": node.name, "fingerprint": node.fingerprint, "status": state, "seconds": seconds, "resumes_at_step": step})
    return rows
