"""Contents of a whole store at a glance: recipes that came to a report, row stores with who uses them, and where the bytes are.

Reads records, commits and listings, never a shard or a payload. A store does not know of a recipe before its report: what is in
none may belong to a run that is not finished.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kd_core.artifacts import Record, find, record_keys
from kd_core.cache.catalog import namespaces
from kd_core.ledger import current
from kd_core.store import Store
from kd_core.summaries import GateSummary, ReportSummary, of, shards_of

__all__ = ["Champion", "Reported", "recipe_rows", "reported", "row_stores", "sizes"]

_WITH_ROWS = ("answers", "soft_labels", "hidden_states")


@dataclass(frozen=True)
class Champion:
    """The newest entry of a model's ledger.

    Attributes:
        number: of the entry, from 1.
        digest: of the student's files.
        is_this_student: whether it is the student of the recipe's newest report.
    """

    number: int
    digest: str
    is_this_student: bool


@dataclass(frozen=True)
class Reported:
    """A recipe by its name, as its newest report in a store has it.

    Attributes:
        name: of the recipe.
        model: registered model name.
        promote: whether the student became champion then.
        headline: the verdict in a sentence.
        modified_seconds: when the report was recorded, seconds since the epoch.
        champion: of the model, now; None where there is none.
        namespaces: names of the row stores that any of its reports used.
    """

    name: str
    model: str
    promote: bool
    headline: str
    modified_seconds: float
    champion: Champion | None
    namespaces: frozenset[str]


def reported(store: Store) -> list[Reported]:
    """Find the recipes that came to a report, sorted by name.

    Raises:
        IntegrityError: a record or a ledger is damaged.
        VersionError, ArtifactError: one is of another version.
    """
    times = {info.key: info.modified_seconds for info in store.list("artifacts/report/")}
    reports: dict[str, list[tuple[float, Record]]] = {}
    for key in record_keys(store, "report"):
        if (record := find(store, *key.split("/")[1:3])) is not None:
            reports.setdefault(str(record.identity["name"]), []).append((times.get(key, 0.0), record))
    return [_newest(store, name, sorted(found, key=lambda item: item[0])) for name, found in sorted(reports.items())]


def _newest(store: Store, name: str, found: list[tuple[float, Record]]) -> Reported:
    modified, record = found[-1]
    model, summary = str(record.identity["recipe"]["publish"]), of(record, ReportSummary)
    gate, holder = find(store, "gate", record.upstream["gate"]), current(store, model)
    student = None if gate is None else of(gate, GateSummary).student.digest
    champion = None if holder is None else Champion(holder.number, holder.artifact.digest, holder.artifact.digest == student)
    used = frozenset(namespace for _, one in found for namespace in _namespaces(store, one))
    return Reported(name, model, summary.promote, summary.headline, modified, champion, used)


def _namespaces(store: Store, report: Record) -> list[str]:
    records = [find(store, stage, report.upstream[stage]) for stage in _WITH_ROWS if stage in report.upstream]
    return [shards.namespace for record in records if record is not None and (shards := shards_of(record)) is not None]


def row_stores(store: Store, recipes: Sequence[Reported], *, now_seconds: float) -> list[dict[str, Any]]:
    """Describe the row stores as plain data, with the names of those recipes that use each.

    Raises:
        IntegrityError: a commit or a description is not readable as one.
        VersionError: one of them is of another version.
    """
    return [
        {
            "namespace": n.cache.namespace,
            "table": n.cache.table,
            "teacher": n.teacher,
            "policy": n.policy,
            "recipes": [recipe.name for recipe in recipes if n.cache.namespace in recipe.namespaces],
            "rows": n.num_rows,
            "tokens": n.num_tokens,
            "bytes": n.snapshot.size_bytes(),
            "commits": len(n.snapshot.commits),
            "age_seconds": max(0.0, now_seconds - n.modified_seconds),
        }
        for n in namespaces(store)
    ]


def sizes(store: Store) -> dict[str, dict[str, int]]:
    """Count objects and bytes below each first part of the keys: 'artifacts', 'rows', 'checkpoints' ..."""
    found: dict[str, dict[str, int]] = {}
    for info in store.list(""):
        part = found.setdefault(info.key.partition("/")[0], {"objects": 0, "bytes": 0})
        part["objects"] += 1
        part["bytes"] += info.size_bytes
    return found


def recipe_rows(recipes: Sequence[Reported], *, now_seconds: float) -> list[dict[str, Any]]:
    """Describe recipes as plain data."""
    rows = []
    for recipe in recipes:
        row = asdict(recipe)
        del row["modified_seconds"]
        rows.append({**row, "age_seconds": max(0.0, now_seconds - recipe.modified_seconds), "namespaces": sorted(recipe.namespaces)})
    return rows
