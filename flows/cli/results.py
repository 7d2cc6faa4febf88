"""What a finished or half-finished run looks like, read from the store: outcome, status, report files."""

import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flows.cli.console import human_bytes, human_seconds
from kd_core.artifacts import Artifact, Record, check_sizes, find, read_bytes
from kd_core.errors import ArtifactError
from kd_core.evaluate.statistics import METRICS
from kd_core.recipe import Recipe
from kd_core.stages.graph import build_graph
from kd_core.store import Store
from kd_core.summaries import GateSummary, PublishSummary, of
from kd_core.train.checkpoints import Checkpoints

__all__ = ["outcome", "outcome_text", "report_files", "status_rows"]

_COLUMNS = 80


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
    verdict = of(gate, GateSummary)
    return {
        "verdict": {"promote": verdict.promote, "headline": verdict.headline, "reasons": [asdict(reason) for reason in verdict.reasons]},
        "published": asdict(of(published, PublishSummary)),
        "nodes": nodes,
    }


def outcome_text(recipe: Recipe, store: Store, done: Mapping[str, Artifact], recipe_file: str, overrides: list[str]) -> str:
    """The end of a run in a few lines: what was asked, found and decided, then the rules, main numbers, and what to do next."""
    report = json.loads(report_files(recipe, store, recipe_file)["report.json"])
    record = _record(recipe, store, "publish")
    assert record is not None, "a run ends after publication"
    published = of(record, PublishSummary)
    hits, spent = sum(a.hit for a in done.values()), sum(a.seconds for a in done.values() if not a.hit)
    finding = report["finding"]
    lines = ["", *textwrap.wrap(f"{finding['asked']} {finding['found']}", _COLUMNS, break_on_hyphens=False), ""]
    lines += [f"{finding['title']}."] if finding["claim"] != "shown" and report["verdict"]["promote"] else []
    lines += [finding["decided"]]
    lines += [
        f"  {'holds' if reason['holds'] else 'FAILS'}  {reason['rule']}: {reason['detail']}" for reason in report["verdict"]["reasons"]
    ]
    for suite in report["suites"]:
        lines += ["", f"On {suite}, {report['confidence']:.0%} intervals about {_about(report)}:"]
        lines += [f"  {name:<14} {_shown(model, suite, report)}" for name, model in report["models"].items()]
    lines += [""]
    for name, model in report["models"].items():
        if model["params"]:
            lines.append(f"  {name:<14} {model['params']:,} parameters, {human_bytes(model['bytes'])}")
    used = report["counts"]["Rows learnt from"]
    lines += ["", "  " + ", ".join(f"{count:,} {what}" for what, count in used.items())]
    version = f"{published.model} version {published.version}"
    champion = "none" if published.champion_version is None else f"version {published.champion_version}"
    lines += ["", f"Registered: {version}; champion: {champion} ({published.tracking})"]
    again = shlex.join(["kd", "report", recipe_file, *(word for o in overrides for word in ("--set", o))])
    lines += [f"{hits} of {len(done)} nodes were done already; {human_seconds(spent)} of work.", f"Full report:  {again}"]
    return "\n".join(lines)


def _about(report: Mapping[str, Any]) -> str:
    """What the student's intervals are about, in words."""
    num_seeds = len(report["seeds"])
    if num_seeds == 1:
        return "these checkpoints on new items (1 seed: nothing about the recipe)"
    return f"the recipe on new items and seeds ({num_seeds} seeds; seed {report['published_seed']} would be published)"


def _shown(model: Mapping[str, Any], suite: str, report: Mapping[str, Any]) -> str:
    """One model's metrics on a suite, with their intervals, and the items where some have no value."""
    prefix = "" if suite == report["suite"] else f"{suite}/"
    shown = []
    for metric in (name for name in METRICS if name != "truncated"):
        if (found := model["metrics"].get(prefix + metric)) is not None:
            items = f" on {found['n']} of {found['n'] + found['left_out']} items" if found["left_out"] else ""
            shown.append(f"{metric} {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{items}")
    return ", ".join(shown) or "not measured"


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
