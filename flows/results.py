"""What a finished or half-finished run looks like, read from the store: outcome, status, report files."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from flows.console import human_bytes, human_seconds
from kd_core.artifacts import Artifact, Record, check_sizes, find, read_bytes
from kd_core.errors import ArtifactError
from kd_core.recipe import Recipe
from kd_core.stages.graph import build_graph
from kd_core.store import Store
from kd_core.train.checkpoints import Checkpoints

__all__ = ["outcome", "outcome_text", "report_files", "status_rows"]


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
    return {
        "verdict": {n: gate.summary[n] for n in ("promote", "headline", "reasons")},
        "published": dict(published.summary),
        "nodes": nodes,
    }


def outcome_text(recipe: Recipe, store: Store, done: Mapping[str, Artifact], recipe_file: str, overrides: list[str]) -> str:
    """The end of a run in a few lines: verdict, main numbers, what to do next."""
    report = json.loads(report_files(recipe, store, recipe_file)["report.json"])
    published = _record(recipe, store, "publish")
    assert published is not None, "a run ends after publication"
    hits, spent = sum(a.hit for a in done.values()), sum(a.seconds for a in done.values() if not a.hit)
    lines = ["", report["verdict"]["headline"], ""]
    for name, model in report["models"].items():
        shown = ", ".join(
            f"{m} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
            for m, v in model["metrics"].items()
            if "/" not in m and m != "truncated"
        )
        size = f"{model['params']:,} parameters, {human_bytes(model['bytes'])}" if model["params"] else ""
        lines.append(f"  {name:<14} {shown}  ({size})")
    version = f"{published.summary['model']} version {published.summary['version']}"
    champion = published.summary["champion_version"]
    lines += [
        "",
        f"Registered: {version}; champion: {'version ' + str(champion) if champion else 'none'} ({published.summary['tracking']})",
    ]
    again = shlex.join(["kd", "report", recipe_file, *(word for o in overrides for word in ("--set", o))])
    lines += [f"{hits} of {len(done)} nodes were done already; {human_seconds(spent)} of work.", f"Full report:  {again}"]
    return "\n".join(lines)


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
        seconds = float(record.summary["seconds"]) if record is not None else None
        rows.append({"name": node.name, "fingerprint": node.fingerprint, "status": state, "seconds": seconds, "resumes_at_step": step})
    return rows
