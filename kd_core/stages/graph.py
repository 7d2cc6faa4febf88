"""The stages of a recipe as a graph: their order, identities and fingerprints, written once.

    prompts -> teacher -> answers -> curate -> soft_labels, vocabulary -> student/baseline/ablation_hard (one node a seed)
            -> evaluate (one node a model) -> gate -> report -> publish

Pure data about a recipe: no torch, nothing computed, nothing written. The plan, the local run and the flow all follow this
graph, so they cannot drift apart. A node's fingerprint = its stage, its own identity, its upstream fingerprints.

The graph is drawn once a run, since drawing it reads every source. Its last part (the champion's evaluation, the gate, the report, the
publication) depends on who the champion is, which is known when the students are trained: ``with_verdict`` draws that part again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd_core import artifacts
from kd_core.curate.verifier import GRADER_VERSION
from kd_core.errors import ArtifactError
from kd_core.evaluate.samples import samples_identity
from kd_core.fingerprint import fingerprint
from kd_core.ledger import Entry, champion_before
from kd_core.prompts.collect import CLEANING_VERSION
from kd_core.prompts.sources import source_identity
from kd_core.recipe import (
    Arm,
    ClassificationTask,
    HiddenStateFeatures,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    Source,
    SourceSuite,
    Task,
    TrainedClassifier,
    TrainedTeacher,
)
from kd_core.recipe.addresses import redact_url
from kd_core.rows.keys import sampling_identity
from kd_core.store import Store
from kd_core.summaries import TrainSummary, of
from kd_core.teacher.reference import reference_identity

__all__ = [
    "VERDICT",
    "Graph",
    "Node",
    "build_graph",
    "champion",
    "find_node",
    "least_validation_loss",
    "open_node",
    "selected_student",
    "with_verdict",
]


@dataclass(frozen=True)
class Node:
    """One unit of work with one artifact.

    Attributes:
        name: unique in the recipe: 'prompts', 'student.0', 'evaluate.baseline'.
        group: the line it belongs to in plans and reports: 'student', 'evaluate'.
        stage: which function computes it: 'train', 'evaluate'; part of the fingerprint.
        identity: the recipe fields that decide its result, plain data.
        upstream: role -> node name.
        above: role -> that node's fingerprint.
        fingerprint: 32 hex.
    """

    name: str
    group: str
    stage: str
    identity: dict[str, Any]
    upstream: dict[str, str]
    above: dict[str, str]
    fingerprint: str


Graph = Mapping[str, Node]
"""Node name -> node, in an order in which they can be computed."""

VERDICT = ("evaluate.champion", "gate", "report", "publish")
"""Nodes that depend on who the champion is."""


@dataclass
class _Builder:
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str, stage: str, identity: dict[str, Any], upstream: dict[str, str]) -> None:
        identity = _used(identity)
        above = {role: self.nodes[node].fingerprint for role, node in upstream.items()}
        fp = fingerprint({"stage": stage, "identity": identity, "upstream": above})
        self.nodes[name] = Node(name, name.partition(".")[0], stage, identity, upstream, above, fp)


def _used(identity: Any) -> Any:
    """Plain data without what is None: a field that a recipe does not use is not part of it, so a new field moves no node that has none."""
    if isinstance(identity, dict):
        return {name: _used(value) for name, value in identity.items() if value is not None}
    return [_used(value) for value in identity] if isinstance(identity, list) else identity


def build_graph(recipe: Recipe, store: Store) -> Graph:
    """Draw all nodes in an order in which they can be computed.

    Every source is read, for its content hash. The store is read for one thing only: who the champion is, which the gate compares with.
    """
    build = _Builder()
    benchmarks = _benchmarks_identity(recipe)
    task = recipe.task.model_dump(mode="json")
    prompts = {
        "sources": _sources_identity(recipe, recipe.prompts.sources, where="prompts.sources"),
        "split": recipe.prompts.split.model_dump(mode="json"),
        "max_characters": recipe.prompts.max_characters,
        "benchmarks": benchmarks,
        "answer_marker": task.get("answer_marker"),
        "input": task.get("input"),
        "cleaning": CLEANING_VERSION,
    }
    build.add("prompts", "prompts", prompts, {})
    build.add("teacher", "teacher", _teacher_identity(recipe, benchmarks), {})
    above = {"prompts": "prompts", "teacher": "teacher"}
    if recipe.answers is not None:
        sampling = {
            **sampling_identity(recipe, recipe.answers),
            "num_samples": recipe.answers.num_samples,
            "template": task["template"],
            "system": task["system"],
            "date": None if isinstance(recipe.teacher, ServerTeacher) else task["date"],  # a server words its prompts itself
        }
        build.add("answers", "answers", sampling, above)
    curate = {
        "curate": recipe.curate.model_dump(mode="json"),
        "task": task,
        "grader": GRADER_VERSION,
        "student": _student_identity(recipe, only_tokenizer=True),
    }
    build.add("curate", "curate", curate, {**above, "answers": "answers"} if recipe.answers is not None else above)
    if recipe.student.vocabulary is not None:
        own = reference_identity(recipe.student) if isinstance(recipe.student, PretrainedStudent) else None
        kept = recipe.student.vocabulary.model_dump(mode="json", exclude={"least_kept_mass"})
        build.add("vocabulary", "vocabulary", {"vocabulary": kept, "tokenizer": own}, {**above, "curate": "curate"})
    rows_of = {"curate": "curate", **_inputs_of(recipe)}
    if recipe.soft_labels is not None and recipe.objective.supervision == "soft":
        build.add("soft_labels", "soft_labels", recipe.soft_labels.model_dump(mode="json"), {**rows_of, "teacher": "teacher"})
    if recipe.hidden_states is not None:
        wanted = recipe.hidden_states.model_dump(mode="json")
        if recipe.soft_labels is not None and recipe.soft_labels.max_refused_rows > 0:
            wanted["max_refused_rows"] = recipe.soft_labels.max_refused_rows
        build.add("hidden_states", "hidden_states", wanted, {"curate": "curate", "teacher": "teacher"})
    for arm in recipe.arms():
        for seed in recipe.seeds:
            _add_training(build, recipe, arm, seed)
    for model in _evaluated(recipe):
        identity = {"evaluation": _evaluation_identity(recipe), "task": task, "grader": GRADER_VERSION}
        roles = {"model": "teacher"} if model == "teacher" else {f"model.{seed}": f"{model}.{seed}" for seed in recipe.seeds}
        build.add(f"evaluate.{model}", "evaluate", identity, {**above, **roles})
    return with_verdict(recipe, store, build.nodes)


def with_verdict(recipe: Recipe, store: Store, nodes: Graph) -> Graph:
    """The graph with its last part drawn for the champion of now, whom the recipe's student must face."""
    build = _Builder({name: node for name, node in nodes.items() if name not in VERDICT})
    _add_verdict(build, recipe, champion(recipe, store, nodes))
    return build.nodes


def _add_training(build: _Builder, recipe: Recipe, arm: Arm, seed: int) -> None:
    features = recipe.objective.features
    objective = recipe.arm(arm).objective.model_dump(mode="json")
    soft = objective["supervision"] == "soft"
    if soft and recipe.student.vocabulary is not None:
        objective["least_kept_mass"] = recipe.student.vocabulary.least_kept_mass  # a condition on its soft part
    identity = {
        "student": _student_identity(recipe),
        "objective": objective if soft else {"supervision": objective["supervision"]},
        "training": recipe.training.model_dump(mode="json", exclude={"least_rows_share"}),
        "seed": seed,
    }
    upstream = {"curate": "curate", "teacher": "teacher", **_inputs_of(recipe)}
    if recipe.student.vocabulary is not None:
        upstream["vocabulary"] = "vocabulary"
    if soft or (arm == "ablation_hard" and recipe.soft_labels is not None and recipe.soft_labels.max_refused_rows > 0):
        upstream["soft_labels"] = "soft_labels"  # the ablation learns from the same rows: those the teacher did not fail on
    if soft and isinstance(features, HiddenStateFeatures) and features.source == "cached":
        upstream["hidden_states"] = "hidden_states"
    build.add(f"{arm}.{seed}", "train", identity, upstream)


def _inputs_of(recipe: Recipe) -> dict[str, str]:
    """The node that holds what rows refer to by hash, for whoever reads rows; nothing where a row says all itself."""
    return {} if isinstance(recipe.task, Task) else {"prompts": "prompts"}


def _sources_identity(recipe: Recipe, sources: Sequence[Source], *, where: str) -> list[dict[str, Any]]:
    images = isinstance(recipe.task, ClassificationTask) and recipe.task.input == "image"
    return [source_identity(s, s3=recipe.run.s3, where=f"{where}.{i}", images=images) for i, s in enumerate(sources)]


def _evaluation_identity(recipe: Recipe) -> dict[str, Any]:
    suites = [suite.model_dump(mode="json", exclude={"source"}) for suite in recipe.evaluation.suites]
    unseen = recipe.curate.model_dump(mode="json").get("leave_out_classes")  # what unseen_recall is measured on
    own = {"suites": suites, "samples": samples_identity(recipe), "unseen": unseen}
    return {**recipe.evaluation.model_dump(mode="json", include={"generate"}), **own}


def _add_verdict(build: _Builder, recipe: Recipe, holder: Entry | None) -> None:
    evaluated = {name: name for name in build.nodes if build.nodes[name].stage == "evaluate"}
    if holder is not None:
        task = recipe.task.model_dump(mode="json")
        identity = {"evaluation": _evaluation_identity(recipe), "task": task, "grader": GRADER_VERSION, "champion": holder.artifact.digest}
        build.add("evaluate.champion", "evaluate", identity, {"prompts": "prompts", "teacher": "teacher"})
        evaluated["evaluate.champion"] = "evaluate.champion"
    students = {f"student.{seed}": f"student.{seed}" for seed in recipe.seeds}
    gate = {
        "rules": recipe.gate.model_dump(mode="json"),
        "confidence": recipe.evaluation.confidence,
        "suites": [suite.name for suite in recipe.evaluation.suites],
        "champion": holder.artifact.digest if holder is not None else None,
    }
    build.add("gate", "gate", gate, {**evaluated, **students, "teacher": "teacher"})
    whole = _without_places(recipe.model_dump(mode="json", exclude={"run"}))
    report = {"name": recipe.name, "description": recipe.description, "recipe": whole}
    build.add("report", "report", report, {name: name for name in build.nodes})
    everything = {name: name for name in build.nodes}
    tracking = recipe.run.tracking
    place = fingerprint(tracking and redact_url(tracking))  # a publication is an effect at a place: another registry has not had it yet
    build.add("publish", "publish", {"model": recipe.publish, "registry": place}, everything)


def _without_places(data: Any) -> Any:
    """Plain data of a recipe without paths of files and local models: their content is above, and the same in another folder."""
    if isinstance(data, dict):
        kind, is_local = data.get("kind"), data.get("revision") is None and "://" not in str(data.get("model"))
        gone = {"path"} if kind in ("file", "folder") else {"model"} if kind == "pretrained" and is_local else set()
        return {name: _without_places(value) for name, value in data.items() if name not in gone}
    return [_without_places(value) for value in data] if isinstance(data, list) else data


def _evaluated(recipe: Recipe) -> tuple[str, ...]:
    return (*(("teacher",) if "teacher" in recipe.evaluation.compare else ()), *recipe.arms())


def _benchmarks_identity(recipe: Recipe) -> list[dict[str, Any]]:
    """Suites with a source of their own: prompts that overlap with them are removed, whatever their limit."""
    return [
        {"name": suite.name, "source": _sources_identity(recipe, [suite.source], where=f"evaluation.suites.{i}.source")[0]}
        for i, suite in enumerate(recipe.evaluation.suites)
        if isinstance(suite, SourceSuite)
    ]


def _teacher_identity(recipe: Recipe, benchmarks: list[dict[str, Any]]) -> dict[str, Any]:
    teacher = recipe.teacher
    if isinstance(teacher, PretrainedTeacher):
        return {"kind": teacher.kind, "reference": reference_identity(teacher), "trust_remote_code": teacher.trust_remote_code}
    if isinstance(teacher, TrainedTeacher | TrainedClassifier):
        own = teacher.model_dump(mode="json", exclude={"sources": True, "training": {"least_rows_share"}})
        sources = _sources_identity(recipe, teacher.sources or recipe.prompts.sources, where="teacher.sources")
        if isinstance(teacher, TrainedClassifier) and teacher.reference is not None:
            own |= {"model": None, "revision": None, "reference": reference_identity(teacher.reference)}
        kept = recipe.prompts.model_dump(mode="json", include={"split", "max_characters"})
        task = recipe.task.model_dump(mode="json", exclude={"verifier"})
        return {
            **own,
            "sources": sources,
            **kept,
            "benchmarks": benchmarks,
            "task": task,
            "seed": recipe.seeds[0],
            "cleaning": CLEANING_VERSION,
        }
    return teacher.model_dump(mode="json", exclude={"price_per_million_tokens"})


def _student_identity(recipe: Recipe, *, only_tokenizer: bool = False) -> dict[str, Any] | None:
    student = recipe.student
    if only_tokenizer and not isinstance(recipe.teacher, ServerTeacher):
        return None  # the teacher's is used
    if isinstance(student, PretrainedStudent):
        identity = {"kind": student.kind, "reference": reference_identity(student)}
        return identity if only_tokenizer else {**identity, "adapter": student.model_dump(mode="json")["adapter"]}
    return student.model_dump(mode="json", exclude={"vocabulary"})  # that is a node of its own


def selected_student(recipe: Recipe, store: Store, nodes: Graph) -> artifacts.Record | None:
    """The student to publish: least validation loss among the seeds (the first seed without validation rows); None before training."""
    records = [find_node(store, nodes[f"student.{seed}"]) for seed in recipe.seeds]
    done = [record for record in records if record is not None]
    return least_validation_loss(done) if len(done) == len(records) else None


def least_validation_loss(students: Sequence[artifacts.Record]) -> artifacts.Record:
    """The student with the least validation loss, the first of equals; the first one where there are no validation rows."""
    losses = [loss for student in students if (loss := of(student, TrainSummary).training.validation_nll) is not None]
    return students[0] if len(losses) < len(students) else students[losses.index(min(losses))]


def find_node(store: Store, node: Node) -> artifacts.Record | None:
    """The record of a finished node, or None.

    Raises:
        IntegrityError: the record is damaged.
        ArtifactError: it is the record of another identity than the node's.
    """
    record = artifacts.find(store, node.stage, node.fingerprint)
    if record is not None:
        artifacts.expect_identity(record, node.identity, node.above)
    return record


def open_node(store: Store, node: Node) -> artifacts.Record:
    """The record of a node that must be done.

    Raises:
        ArtifactError: it is not.
    """
    record = find_node(store, node)
    if record is None:
        raise ArtifactError(f"{node.name} {node.fingerprint} is not in {store.uri}; run the recipe to compute it")
    return record


def champion(recipe: Recipe, store: Store, nodes: Graph) -> Entry | None:
    """The champion that this recipe's student must face: the current one, or its predecessor if the student is it."""
    student = selected_student(recipe, store, nodes)
    return champion_before(store, recipe.publish, None if student is None else student.digest)
