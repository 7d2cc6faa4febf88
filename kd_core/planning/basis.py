"""Store and recipe that a plan is made of: nodes, their finished records, and the newest records of any recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kd_core.artifacts import Record, find
from kd_core.recipe import Recipe
from kd_core.stages.graph import Graph
from kd_core.store import Store
from kd_core.summaries import ClassifierIdentity, ModelIdentity, TeacherSummary, of

__all__ = ["Basis", "teacher_columns"]

_NEWEST_RECORDS = 20


@dataclass(frozen=True)
class Basis:
    """One recipe against one store.

    Attributes:
        recipe: the recipe.
        store: where artifacts and rows are.
        nodes: its graph.
        records: finished record of each node, or None.
    """

    recipe: Recipe
    store: Store
    nodes: Graph
    records: Mapping[str, Record | None]

    @cached_property
    def _finished(self) -> dict[str, list[Record]]:
        return {}

    def finished(self, stage: str) -> list[Record]:
        """Read the newest finished records of a stage, of any recipe, oldest first: rates are measured on them."""
        if stage not in self._finished:
            infos = [info for info in self.store.list(f"artifacts/{stage}/") if info.key.endswith("/record.json")]
            newest = sorted(infos, key=lambda info: (info.modified_seconds, info.key))[-_NEWEST_RECORDS:]
            records = (find(self.store, stage, info.key.split("/")[-2]) for info in newest)
            self._finished[stage] = [record for record in records if record is not None]
        return self._finished[stage]


def teacher_columns(teacher: Record) -> int:
    """Vocabulary columns of a finished teacher that runs here."""
    identity = of(teacher, TeacherSummary).teacher
    if isinstance(identity, ClassifierIdentity):
        return len(identity.classes)
    assert isinstance(identity, ModelIdentity), "a server's columns are not known, and nothing is scored by it"
    return identity.num_columns
