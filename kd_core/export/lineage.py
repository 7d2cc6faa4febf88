"""Where a student comes from: every record on its way, read from the store. Importable without torch.

A lineage is complete or there is none: a student without its report would leave with a card that claims nothing.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import pyarrow.parquet as pq

from kd_core.artifacts import Record, find, read_bytes
from kd_core.errors import ArtifactError, RecipeError
from kd_core.export.licences import model_licence
from kd_core.recipe import PretrainedStudent, PretrainedTeacher, Recipe, StudentFromTeacher
from kd_core.stages.graph import build_graph, selected_student
from kd_core.store import Store
from kd_core.store.versions import VERSION
from kd_core.summaries import TrainSummary, of

__all__ = ["Lineage", "collect_lineage", "lineage_json"]


@dataclass(frozen=True)
class Lineage:
    """A student and everything it was made and judged with.

    Attributes:
        recipe: the whole recipe.
        student: record of the exported student.
        records: node name -> record, in the order of the graph, without the publication.
        prompts: source -> split -> number of prompts kept.
        report: the report's JSON: scores with intervals, verdict, comparisons, counts.
        teacher_licence: as its authors state it where they are at hand; None is unknown.
        base_licence: that of the pre-trained weights the student started from; None is unknown.
    """

    recipe: Recipe
    student: Record
    records: Mapping[str, Record]
    prompts: Mapping[str, Mapping[str, int]]
    report: Mapping[str, Any]
    teacher_licence: str | None
    base_licence: str | None

    @property
    def trained(self) -> TrainSummary:
        """Summary of the student's training."""
        return of(self.student, TrainSummary)

    @property
    def derived(self) -> bool:
        """Whether the student started from weights of others."""
        recipe = self.recipe
        from_theirs = isinstance(recipe.student, StudentFromTeacher) and isinstance(recipe.teacher, PretrainedTeacher)
        return from_theirs or isinstance(recipe.student, PretrainedStudent)


def collect_lineage(recipe: Recipe, store: Store, *, seed: int | None, command: str) -> Lineage:
    """Read the records behind a recipe's student, each verified.

    Args:
        recipe: whose student.
        store: where its artifacts are.
        seed: which of the recipe's students; None is the one that the gate chose.
        command: what makes a missing artifact, for messages: 'kd run recipes/quickstart.yaml'.

    Raises:
        RecipeError: the recipe has no such seed.
        ArtifactError: the student, or its report, is not finished.
        IntegrityError: a record or report is damaged.
    """
    if seed is not None and seed not in recipe.seeds:
        raise RecipeError(f"--seed {seed}: the recipe has no student of that seed; its seeds are {list(recipe.seeds)}")
    nodes = build_graph(recipe, store)
    wanted = None if seed is None else nodes[f"student.{seed}"]
    student = selected_student(recipe, store, nodes) if wanted is None else find(store, wanted.stage, wanted.fingerprint)
    if student is None:
        raise ArtifactError(f"the student of {recipe.name} is not finished in {store.uri}; run it first:  {command}")
    records = {}
    for node in [node for name, node in nodes.items() if name != "publish"]:
        record = find(store, node.stage, node.fingerprint)
        if record is None:
            raise ArtifactError(
                f"the student of {recipe.name} is trained, but {node.name} is not done in {store.uri}, and the card is written from it; "
                f"run the recipe to its end first:  {command}"
            )
        records[node.name] = record
    report = json.loads(read_bytes(store, records["report"], "report.json"))
    return Lineage(recipe, student, records, _prompt_counts(store, records["prompts"]), report, *_licences(recipe))


def _prompt_counts(store: Store, prompts: Record) -> dict[str, dict[str, int]]:
    table = pq.read_table(BytesIO(read_bytes(store, prompts, "prompts.parquet")), columns=["source", "split"])
    counts: dict[str, dict[str, int]] = {}
    for (source, split), number in sorted(Counter(zip(*table.to_pydict().values(), strict=True)).items()):
        counts.setdefault(source, {})[split] = number
    return counts


def _licences(recipe: Recipe) -> tuple[str | None, str | None]:
    """Find the licences of the teacher and of the weights that the student started from; None where one is not known."""
    teacher = model_licence(recipe.teacher) if isinstance(recipe.teacher, PretrainedTeacher) else None
    if isinstance(recipe.student, PretrainedStudent):
        return teacher, model_licence(recipe.student)
    return teacher, teacher if isinstance(recipe.student, StudentFromTeacher) else None


def lineage_json(lineage: Lineage, *, files: Mapping[str, Mapping[str, Any]], made_by: Mapping[str, str]) -> dict[str, Any]:
    """The lineage as plain data. It names no place: not the store, not this machine.

    Args:
        lineage: what to write down.
        files: exported file -> size_bytes and sha256.
        made_by: package -> version of the export itself; stages keep theirs.
    """
    student = lineage.student
    return {
        "version": VERSION,
        "recipe": lineage.recipe.name,
        "model": lineage.recipe.publish,
        "student": {"seed": lineage.trained.seed, "fingerprint": student.fingerprint, "digest": student.digest},
        "verdict": lineage.report["verdict"],
        "licences": {"teacher": lineage.teacher_licence, "base": lineage.base_licence},
        "exported_with": dict(made_by),
        "files": {name: dict(about) for name, about in files.items()},
        "nodes": {name: {**asdict(record), "digest": record.digest} for name, record in lineage.records.items()},
    }
