"""Running one node, and all of them: the only place where work turns into artifacts.

A node whose record exists is a hit and computes nothing; its files must be there with their sizes. Everything else (a local
loop, Prefect tasks) is a caller of ``run_node`` along ``walk``.
"""

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from kd_core.artifacts import Artifact, Record, check_bytes, check_sizes, expect_identity, find, forget, open_artifact, publish, workspace
from kd_core.errors import QuarantinedError
from kd_core.ledger import current
from kd_core.progress import Ticker
from kd_core.recipe import Recipe
from kd_core.shards import RowCache
from kd_core.stages.graph import Node, build_graph, open_node, selected_student
from kd_core.stages.job import Job
from kd_core.store import Store

__all__ = ["STAGES", "StageFunction", "run_node"]

_LOG = logging.getLogger(__name__)

StageFunction = Callable[[Job], dict[str, Any]]

STAGES: Mapping[str, str] = {
    "prompts": "kd_core.stages.data:prompts_stage",
    "teacher": "kd_core.stages.teaching:teacher_stage",
    "answers": "kd_core.stages.teaching:answers_stage",
    "curate": "kd_core.stages.data:curate_stage",
    "soft_labels": "kd_core.stages.scoring:soft_labels_stage",
    "hidden_states": "kd_core.stages.scoring:hidden_states_stage",
    "vocabulary": "kd_core.stages.vocabulary:vocabulary_stage",
    "train": "kd_core.stages.learning:train_stage",
    "evaluate": "kd_core.stages.evidence:evaluate_stage",
    "gate": "kd_core.stages.evidence:gate_stage",
    "report": "kd_core.stages.reporting:report_stage",
}
"""Stage -> function, by address: a run in which every stage is a hit imports none of them (nor torch). ``publish`` is
given by the caller, since kd_core knows no registry."""


def _function(stage: str) -> StageFunction:
    module, _, name = STAGES[stage].partition(":")
    function: StageFunction = getattr(importlib.import_module(module), name)
    return function


def run_node(recipe: Recipe, name: str, *, store: Store, tick: Ticker, extra: Mapping[str, StageFunction]) -> Artifact:
    """Compute one node, or find it done.

    A damaged shard that the node meets is moved aside; the stage that made it computes its rows again, once, and the
    node goes on from its checkpoint.

    Args:
        recipe: the recipe.
        name: a node of its graph; all its upstream nodes must be done.
        store: where artifacts live.
        tick: progress.
        extra: functions of stages that live above kd_core ('publish').

    Returns:
        A reference to the finished artifact; ``hit`` says whether it was there.

    Raises:
        ArtifactError: an upstream node is not done.
        KDError: whatever the stage raises; nothing is recorded then.
    """
    try:
        return _run_once(recipe, name, store=store, tick=tick, extra=extra)
    except QuarantinedError as damage:
        _LOG.warning("%s: %s", name, damage)
        nodes = build_graph(recipe, store)
        for upstream in nodes[name].upstream.values():
            record = find(store, nodes[upstream].stage, nodes[upstream].fingerprint)
            if record is not None and not rows_are_there(store, record):
                forget(store, record)
                run_node(recipe, upstream, store=store, tick=tick, extra=extra)
        return _run_once(recipe, name, store=store, tick=tick, extra=extra)


def rows_are_there(store: Store, record: Record) -> bool:
    """Whether every shard that a record froze is still committed; True of a stage without shards."""
    if "commits" not in record.summary:
        return True
    held = {commit.sha256 for commit in RowCache(store, record.stage, record.summary["namespace"]).snapshot().commits}
    return held.issuperset(record.summary["commits"])


def _run_once(recipe: Recipe, name: str, *, store: Store, tick: Ticker, extra: Mapping[str, StageFunction]) -> Artifact:
    nodes = build_graph(recipe, store)
    node = nodes[name]
    above = {role: nodes[upstream].fingerprint for role, upstream in node.upstream.items()}
    if (record := find(store, node.stage, node.fingerprint)) is not None:
        expect_identity(record, node.identity, above)
        check_sizes(store, record)
        if node.stage == "publish":
            check_pointed_to(recipe, store, nodes)
        return Artifact(node.stage, node.fingerprint, record.digest, float(record.summary["seconds"]), hit=True)
    inputs = {role: open_node(store, nodes[upstream]) for role, upstream in node.upstream.items()}
    began = time.perf_counter()
    if recipe.run.threads is not None:
        importlib.import_module("torch").set_num_threads(recipe.run.threads)
    with workspace() as directory:
        job = Job(recipe, node, store, inputs, directory, tick)
        summary = (extra[node.stage] if node.stage in extra else _function(node.stage))(job)
        summary["seconds"] = time.perf_counter() - began
        record = publish(store, directory, stage=node.stage, fp=node.fingerprint, identity=node.identity, upstream=above, summary=summary)
    if node.stage in ("teacher", "train"):
        _forget_checkpoints(store, node.fingerprint)
    return Artifact(node.stage, node.fingerprint, record.digest, float(record.summary["seconds"]), hit=False)


READ_AGAIN_BYTES = 256 << 20
"""Weights up to this size are read whole each time a finished run says what it published (0.2 s on a local disk); of larger ones
presence and sizes are checked, and ``kd cache verify`` reads them. Before a publication every byte is read, whatever the size."""


def check_pointed_to(recipe: Recipe, store: Store, nodes: Mapping[str, Node]) -> None:
    """Check the weights that a finished publication points to: the student's, and the champion's.

    Raises:
        ArtifactError: the champion's record is gone, or of other bytes.
        IntegrityError: a file is gone, or is not as recorded.
    """
    student, holder = selected_student(recipe, store, dict(nodes)), current(store, recipe.publish)
    pointed = {} if student is None else {student.digest: student}
    if holder is not None and holder.artifact.digest not in pointed:
        pointed[holder.artifact.digest] = open_artifact(store, holder.artifact)
    for record in pointed.values():
        check_sizes(store, record)
        if sum(file.size_bytes for file in record.files) <= READ_AGAIN_BYTES:
            check_bytes(store, record)


def _forget_checkpoints(store: Store, fp: str) -> None:
    from kd_core.train.checkpoints import Checkpoints

    Checkpoints(store, fp).clear()
