"""Rows that a recipe asks for and the store holds already, and soft labels that bytes are measured on.

Reads commits and keys, and answers where they key soft labels; never a shard of soft labels.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import pyarrow.parquet as pq
from pydantic import TypeAdapter

from kd_core.artifacts import Record, find, read_bytes
from kd_core.fingerprint import fingerprint
from kd_core.planning.basis import Basis, teacher_columns
from kd_core.planning.costs import GROUP_BYTES
from kd_core.planning.counts import Counts
from kd_core.recipe import SoftLabels
from kd_core.rows.keys import about_hidden_states, answer_namespace, answer_rows, soft_label_key, soft_label_namespace
from kd_core.rows.table import RowCache, Snapshot
from kd_core.summaries import CurateSummary, ScoringSummary, of

__all__ = ["Cached", "CachedRows", "StoredLabels"]

_POLICY: TypeAdapter[SoftLabels] = TypeAdapter(SoftLabels)


@dataclass(frozen=True)
class CachedRows:
    """Rows that a stage asks for, and how many of them the row store holds.

    Attributes:
        rows: asked for.
        cached: found.
        missing_tokens: (tokens, supervised tokens) of the others; None where rows are not known one by one.
        row_bytes: mean stored bytes of the table's rows, without what a row group takes beside them; None if it is empty.
    """

    rows: int | None
    cached: int
    missing_tokens: tuple[int, int] | None = None
    row_bytes: float | None = None


@dataclass(frozen=True)
class StoredLabels:
    """Soft labels that the store holds, by which estimates of bytes are corrected.

    Attributes:
        policy: what was kept.
        num_columns: of the teacher.
        rows: of the table.
        tokens: of those rows, prompts included.
        positions: supervised tokens of those rows.
        groups: row groups of all shards.
        bytes: of all shards.
    """

    policy: SoftLabels
    num_columns: int
    rows: int
    tokens: float
    positions: int
    groups: int
    bytes: int


@dataclass(frozen=True)
class Cached:
    """Rows in the store against the rows of a recipe."""

    basis: Basis
    counts: Counts

    @cached_property
    def _answer_table(self) -> tuple[RowCache, Snapshot, list[str]] | None:
        """Row store of answers, and the keys that it holds of this recipe's; None without a finished teacher or known prompts."""
        answers, teacher = self.basis.recipe.answers, self.basis.records["teacher"]
        if answers is None or teacher is None or self.counts.prompts.table is None:
            return None
        cache = RowCache(self.basis.store, "answers", answer_namespace(self.basis.recipe, answers, teacher))
        snapshot = cache.snapshot()
        held = snapshot.keys()
        asked = answer_rows(self.basis.recipe, answers, teacher, self.counts.prompts.table)
        return cache, snapshot, [key for key, _ in asked if key in held]

    @property
    def answer_namespace(self) -> str | None:
        """Name of the row store of answers; None without a finished teacher or known prompts."""
        return None if self._answer_table is None else self._answer_table[0].namespace

    @cached_property
    def answers(self) -> CachedRows:
        """Answers: exact where prompts and teacher are known."""
        if self._answer_table is None:
            return CachedRows(self.counts.answer_rows, 0)
        _, snapshot, keys = self._answer_table
        return CachedRows(self.counts.answer_rows, len(keys), None, _row_bytes(snapshot))

    def soft_labels(self, policy: SoftLabels) -> CachedRows:
        """Soft labels under a policy: exact after curation.

        Before it, rows are all answers and gold rows; the cached ones are a lower bound: answers that are there and were
        scored. Gold rows cannot be keyed without a tokenizer.
        """
        teacher, done = self.basis.records["teacher"], self.basis.records.get("soft_labels")
        if done is not None and policy == self.basis.recipe.soft_labels:
            rows = of(done, ScoringSummary).shards.rows
            return CachedRows(rows, rows, (0, 0))
        return self._scored_rows("soft_labels", None if teacher is None else soft_label_namespace(policy, teacher))

    @cached_property
    def hidden_states(self) -> CachedRows:
        """Hidden states that the recipe asks for; counted like soft labels."""
        wanted, teacher = self.basis.recipe.hidden_states, self.basis.records["teacher"]
        found = None if wanted is None or teacher is None else fingerprint(about_hidden_states(wanted, teacher))
        return self._scored_rows("hidden_states", found)

    def _scored_rows(self, table: str, namespace: str | None) -> CachedRows:
        held: Collection[str] = () if namespace is None else RowCache(self.basis.store, table, namespace).snapshot().keys()
        if namespace is None or not held:
            return CachedRows(self.counts.curated_rows, 0, None if self.curated is None else _sums(self.curated))
        if self.curated is None:
            return CachedRows(self.counts.curated_rows, self._scored_answers(namespace, held))
        missing = [row for row in self.curated if soft_label_key(namespace, *row) not in held]
        return CachedRows(len(self.curated), len(self.curated) - len(missing), _sums(missing))

    @cached_property
    def curated(self) -> list[tuple[list[int], int]] | None:
        """Token ids and first supervised position of every curated row; None before curation."""
        if (record := self.basis.records["curate"]) is None:
            return None
        table = pq.read_table(BytesIO(read_bytes(self.basis.store, record, "rows.parquet")), columns=["ids", "first_supervised"])
        return list(zip(table["ids"].to_pylist(), table["first_supervised"].to_pylist(), strict=True))

    @cached_property
    def _stored_labels(self) -> dict[str, StoredLabels | None]:
        return {}

    def stored_labels(self, kind: str) -> StoredLabels | None:
        """Soft labels of a kind of policy: this recipe's, else the newest finished ones; None where there are none."""
        if kind not in self._stored_labels:
            self._stored_labels[kind] = self._find_stored_labels(kind)
        return self._stored_labels[kind]

    def _find_stored_labels(self, kind: str) -> StoredLabels | None:
        for policy, teacher, curated in self._labelled(kind):
            snapshot = RowCache(self.basis.store, "soft_labels", soft_label_namespace(policy, teacher)).snapshot()
            positions = sum(commit.num_tokens for commit in snapshot.commits)
            if positions:
                rows = sum(len(commit.keys) for commit in snapshot.commits)
                learnt = of(curated, CurateSummary)
                tokens, columns = rows * learnt.tokens / learnt.rows, teacher_columns(teacher)
                groups = sum(len(commit.ranges) - 1 for commit in snapshot.commits)
                return StoredLabels(policy, columns, rows, tokens, positions, groups, snapshot.size_bytes())
        return None

    def _labelled(self, kind: str) -> Iterator[tuple[SoftLabels, Record, Record]]:
        """List (policy, teacher, curated rows) of row stores of soft labels that may be there."""
        policy, teacher, curated = self.basis.recipe.soft_labels, self.basis.records["teacher"], self.basis.records["curate"]
        if policy is not None and policy.kind == kind and teacher is not None and curated is not None:
            yield policy, teacher, curated
        for record in reversed(self.basis.finished("soft_labels")):
            teacher, curated = (find(self.basis.store, stage, record.upstream[stage]) for stage in ("teacher", "curate"))
            if record.identity["kind"] == kind and teacher is not None and curated is not None:
                yield _POLICY.validate_python(record.identity), teacher, curated

    def _scored_answers(self, namespace: str, held: Collection[str]) -> int:
        if self._answer_table is None or not self._answer_table[2]:
            return 0
        cache, snapshot, keys = self._answer_table
        rows = cache.read(snapshot, keys).to_pylist()
        scored = [soft_label_key(namespace, [*row["prompt_ids"], *row["answer_ids"]], len(row["prompt_ids"])) for row in rows]
        return sum(key in held for key in scored)

    def scored(self, record: Record) -> tuple[float, float] | None:
        """Tell (tokens that the teacher read, seconds) of finished soft labels; None if their rows are gone."""
        curated, shards = find(self.basis.store, "curate", record.upstream["curate"]), of(record, ScoringSummary).shards
        if curated is None:
            return None
        return of(curated, CurateSummary).tokens * shards.rows_computed / shards.rows, record.seconds


def _row_bytes(snapshot: Snapshot) -> float | None:
    rows = sum(len(commit.keys) for commit in snapshot.commits)
    groups = sum(len(commit.ranges) - 1 for commit in snapshot.commits)
    return max(0.0, snapshot.size_bytes() - GROUP_BYTES * groups) / rows if rows else None


def _sums(rows: Sequence[tuple[list[int], int]]) -> tuple[int, int]:
    """Sum up (tokens, supervised tokens) of rows of (ids, first supervised position)."""
    tokens = sum(len(ids) for ids, _ in rows)
    return tokens, tokens - sum(first for _, first in rows)
