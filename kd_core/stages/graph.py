"""The stages of a recipe as a graph: their order, identities and fingerprints, written once.

    prompts -> teacher -> answers -> curate -> soft_labels, vocabulary -> student/baseline/ablation_hard (one node a seed)
            -> evaluate (one node a model) -> gate -> report -> publish

Pure data about a recipe: no torch, nothing computed, nothing written. The plan, the local run and the flow all walk this
graph, so they cannot drift apart. A node's fingerprint = its stage, its own identity, its upstream fingerprints.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kd_core import artifacts
from kd_core.errors import ArtifactError
from kd_core.fingerprint import fingerprint
from kd_core.ledger import Entry, champion_before
from kd_core.prompts.sources import source_identity
from kd_core.recipe import (
    Arm,
    HiddenStateFeatures,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    SourceSuite,
    TrainedTeacher,
)
from kd_core.store import Store
from kd_core.teacher.reference import reference_identity

__all__ = ["Node", "build_graph", "champion", "open_node", "selected_student", "walk"]


@dataclass(frozen=True)
class Node:
    """One unit of work with one artifact.

    Attributes:
        name: unique in the recipe: 'prompts', 'student.0', 'evaluate.baseline'.
        group: the line it belongs to in plans and reports: 'student', 'evaluate'.
        stage: which function computes it: 'train', 'evaluate'; part of the fingerprint.
        identity: the recipe fields that decide its result, plain data.
        upstream: role -> node name.
        fingerprint: 32 hex.
    """

    name: str
    group: str
    stage: str
    identity: dict[str, Any]
    upstream: dict[str, str]
    fingerprint: str


@dataclass
class _Builder:
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str, stage: str, identity: dict[str, Any], upstream: dict[str, str]) -> None:
        above = {role: self.nodes[node].fingerprint for role, node in upstream.items()}
        fp = fingerprint({"stage": stage, "identity": identity, "upstream": above})
        self.nodes[name] = Node(name, name.partition(".")[0], stage, identity, upstream, fp)


def build_graph(recipe: Recipe, store: Store) -> dict[str, Node]:
    """All nodes in an order in which they can be computed.

    The store is read for one thing only: who the champion is, which the gate compares with.
    """
    build = _Builder()
    benchmarks = _benchmarks_identity(recipe)
    task = recipe.task.model_dump(mode="json")
    prompts = {
        "sources": [source_identity(s, s3=recipe.run.s3, where=f"prompts.sources.{i}") for i, s in enumerate(recipe.prompts.sources)],
        "split": recipe.prompts.split.model_dump(mode="json"),
        "max_characters": recipe.prompts.max_characters,
        "benchmarks": benchmarks,
        "answer_marker": task["answer_marker"],
    }
    build.add("prompts", "prompts", prompts, {})
    build.add("teacher", "teacher", _teacher_identity(recipe, benchmarks), {})
    above = {"prompts": "prompts", "teacher": "teacher"}
    if recipe.answers is not None:
        sampling = {
            **recipe.answers.model_dump(mode="json"),
            "template": task["template"],
            "system": task["system"],
            "seed": recipe.seeds[0],
        }
        build.add("answers", "answers", sampling, above)
    curate = {"curate": recipe.curate.model_dump(mode="json"), "task": task, "student": _student_identity(recipe, only_tokenizer=True)}
    build.add("curate", "curate", curate, {**above, "answers": "answers"} if recipe.answers is not None else above)
    if recipe.student.vocabulary is not None:
        own = reference_identity(recipe.student) if isinstance(recipe.student, PretrainedStudent) else None
        kept = recipe.student.vocabulary.model_dump(mode="json", exclude={"least_kept_mass"})
        build.add("vocabulary", "vocabulary", {"vocabulary": kept, "tokenizer": own}, {**above, "curate": "curate"})
    if recipe.soft_labels is not None and recipe.objective.supervision == "soft":
        build.add("soft_labels", "soft_labels", recipe.soft_labels.model_dump(mode="json"), {"curate": "curate", "teacher": "teacher"})
    if recipe.hidden_states is not None:
        wanted = recipe.hidden_states.model_dump(mode="json")
        if recipe.soft_labels is not None and recipe.soft_labels.max_refused_rows > 0:
            wanted["max_refused_rows"] = recipe.soft_labels.max_refused_rows
        build.add("hidden_states", "hidden_states", wanted, {"curate": "curate", "teacher": "teacher"})
    for arm in recipe.arms():
        for seed in recipe.seeds:
            _add_training(build, recipe, arm, seed)
    evaluation = recipe.evaluation.model_dump(mode="json", include={"generate"})
    evaluation["suites"] = [suite.model_dump(mode="json", exclude={"source"}) for suite in recipe.evaluation.suites]
    for model in _evaluated(recipe):
        identity = {"evaluation": evaluation, "task": task}
        roles = {"model": "teacher"} if model == "teacher" else {f"model.{seed}": f"{model}.{seed}" for seed in recipe.seeds}
        build.add(f"evaluate.{model}", "evaluate", identity, {**above, **roles})
    _add_verdict(build, recipe, store, evaluation, task)
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
        "training": recipe.training.model_dump(mode="json"),
        "seed": seed,
    }
    upstream = {"curate": "curate", "teacher": "teacher"}
    if recipe.student.vocabulary is not None:
        upstream["vocabulary"] = "vocabulary"
    if soft or (arm == "ablation_hard" and recipe.soft_labels is not None and recipe.soft_labels.max_refused_rows > 0):
        upstream["soft_labels"] = "soft_labels"  # the ablation learns from the same rows: those the teacher did not fail on
    if soft and isinstance(features, HiddenStateFeatures) and features.source == "cached":
        upstream["hidden_states"] = "hidden_states"
    build.add(f"{arm}.{seed}", "train", identity, upstream)


def _add_verdict(build: _Builder, recipe: Recipe, store: Store, evaluation: dict[str, Any], task: dict[str, Any]) -> None:
    evaluated = {name: name for name in build.nodes if build.nodes[name].stage == "evaluate"}
    holder = champion(recipe, store, build.nodes)
    if holder is not None:
        identity = {"evaluation": evaluation, "task": task, "champion": holder.artifact.digest}
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
    report = {"name": recipe.name, "description": recipe.description, "recipe": recipe.model_dump(mode="json", exclude={"run"})}
    build.add("report", "report", report, {name: name for name in build.nodes})
    everything = {name: name for name in build.nodes}
    place = fingerprint(recipe.run.tracking)  # a publication is an effect at a place: another registry has not had it yet
    build.add("publish", "publish", {"model": recipe.publish, "registry": place}, everything)


def _evaluated(recipe: Recipe) -> tuple[str, ...]:
    return (*(("teacher",) if "teacher" in recipe.evaluation.compare else ()), *recipe.arms())


def _benchmarks_identity(recipe: Recipe) -> list[dict[str, Any]]:
    """Suites with a source of their own: prompts that overlap with them are removed, whatever their limit."""
    return [
        {"name": suite.name, "source": source_identity(suite.source, s3=recipe.run.s3, where=f"evaluation.suites.{i}.source")}
        for i, suite in enumerate(recipe.evaluation.suites)
        if isinstance(suite, SourceSuite)
    ]


def _teacher_identity(recipe: Recipe, benchmarks: list[dict[str, Any]]) -> dict[str, Any]:
    teacher = recipe.teacher
    if isinstance(teacher, PretrainedTeacher):
        return {"kind": teacher.kind, "reference": reference_identity(teacher), "trust_remote_code": teacher.trust_remote_code}
    if isinstance(teacher, TrainedTeacher):
        own = teacher.model_dump(mode="json", exclude={"sources"})
        sources = [source_identity(s, s3=recipe.run.s3, where=f"teacher.sources.{i}") for i, s in enumerate(teacher.sources)]
        kept = recipe.prompts.model_dump(mode="json", include={"split", "max_characters"})
        task = recipe.task.model_dump(mode="json", exclude={"verifier"})
        return {**own, "sources": sources, **kept, "benchmarks": benchmarks, "task": task, "seed": recipe.seeds[0]}
    return teacher.model_dump(mode="json", exclude={"price_per_million_tokens"})


def _student_identity(recipe: Recipe, *, only_tokenizer: bool = False) -> dict[str, Any] | None:
    student = recipe.student
    if only_tokenizer and not isinstance(recipe.teacher, ServerTeacher):
        return None  # the teacher's is used
    if isinstance(student, PretrainedStudent):
        identity = {"kind": student.kind, "reference": reference_identity(student)}
        return identity if only_tokenizer else {**identity, "adapter": student.model_dump(mode="json")["adapter"]}
    return student.model_dump(mode="json", exclude={"vocabulary"})  # that is a node of its own


def selected_student(recipe: Recipe, store: Store, nodes: dict[str, Node]) -> artifacts.Record | None:
    """The student to publish: least validation loss among the seeds (the first seed without validation rows); None before training."""
    records = [artifacts.find(store, "train", nodes[f"student.{seed}"].fingerprint) for seed in recipe.seeds]
    done = [record for record in records if record is not None]
    if len(done) < len(records):
        return None
    losses = [record.summary["validation_nll"] for record in done]
    return done[0] if any(loss is None for loss in losses) else min(zip(losses, range(len(done)), done, strict=True))[2]


def open_node(store: Store, node: Node) -> artifacts.Record:
    """The record of a node that must be done.

    Raises:
        ArtifactError: it is not.
    """
    record = artifacts.find(store, node.stage, node.fingerprint)
    if record is None:
        raise ArtifactError(f"{node.name} {node.fingerprint} is not in {store.uri}; run the recipe to compute it")
    return record


def champion(recipe: Recipe, store: Store, nodes: dict[str, Node]) -> Entry | None:
    """The champion that this recipe's student must face: the current one, or its predecessor if the student is it."""
    student = selected_student(recipe, store, nodes)
    return champion_before(store, recipe.publish, None if student is None else student.digest)


def walk(recipe: Recipe, store: Store) -> Iterator[Node]:
    """Every node once, in order. The graph is drawn again at each step: who is champion is known only after training.

    The caller must compute each node before it asks for the next.
    """
    done: set[str] = set()
    while True:
        nodes = build_graph(recipe, store)
        node = next((node for name, node in nodes.items() if name not in done), None)
        if node is None:
            return
        yield node
        done.add(node.name)
