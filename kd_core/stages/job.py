"""Argument of a stage function, with tables in and out of artifacts."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.artifacts import Record, materialize, read_bytes
from kd_core.ledger import Entry, history
from kd_core.progress import Ticker
from kd_core.recipe import Recipe
from kd_core.stages.graph import Node
from kd_core.store import Store
from kd_core.store.scratch import scratch
from kd_core.summaries import Kind, of

__all__ = ["Job"]

_GROUP_ROWS = 1024


@dataclass(frozen=True)
class Job:
    """One node to compute.

    Attributes:
        recipe: the whole recipe; a stage reads only what is in its identity, and ``run``.
        node: name, fingerprint and upstream roles.
        store: where artifacts and rows live.
        inputs: role -> finished record of the upstream node.
        directory: an empty directory; every file left here becomes part of the artifact.
        tick: progress.
    """

    recipe: Recipe
    node: Node
    store: Store
    inputs: Mapping[str, Record]
    directory: Path
    tick: Ticker

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as a Parquet file of the artifact, in row groups that can be read one by one."""
        pq.write_table(table, self.directory / name, compression="zstd", row_group_size=_GROUP_ROWS)

    def read_table(self, role: str, name: str) -> pa.Table:
        """Read a Parquet file of an upstream artifact, verified."""
        return pq.read_table(io.BytesIO(read_bytes(self.store, self.inputs[role], name)))

    @contextmanager
    def files(self, record: Record) -> Iterator[Path]:
        """The files of an artifact as local files, verified, for the time of the context."""
        with scratch() as path:
            yield materialize(self.store, record, path)

    def champion(self) -> Entry | None:
        """The ledger's entry of the champion that this node was drawn for; None where there was none."""
        digest = self.node.identity.get("champion")
        entries = reversed(history(self.store, self.recipe.publish))
        return None if digest is None else next(entry for entry in entries if entry.artifact.digest == digest)

    def summary(self, role: str, kind: type[Kind]) -> Kind:
        """Read what an upstream node hands on beside its files."""
        return of(self.inputs[role], kind)
