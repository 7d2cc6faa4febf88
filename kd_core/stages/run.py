"""Running one node, and all of them: the only place where work turns into artifacts.

A node whose record exists is a hit and computes nothing. Everything else (a local loop, Prefect tasks) is a caller of
``run_node`` along ``walk``.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from kd_core.artifacts import Artifact, expect_identity, find, publish, workspace
from kd_core.progress import Ticker
from kd_core.recipe import Recipe
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.job import Job
from kd_core.store import Store

__all__ = ["STAGES", "StageFunction", "run_node"]

StageFunction = Callable[[Job], dict[str, Any]]

STAGES: Mapping[str, str] = {
    "prompts": "kd_core.stages.data:prompts_stage",
    "teacher": "kd_core.stages.teaching:teacher_stage",
    "answers": "kd_core.stages.teaching:answers_stage",
    "curate": "kd_core.stages.data:curate_stage",
    "soft_labels": "kd_core.stages.teaching:soft_labels_stage",
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
    nodes = build_graph(recipe, store)
    node = nodes[name]
    above = {role: nodes[upstream].fingerprint for role, upstream in node.upstream.items()}
    if (record := find(store, node.stage, node.fingerprint)) is not None:
        expect_identity(record, node.identity, above)
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


def _forget_checkpoints(store: Store, fp: str) -> None:
    from kd_core.train.checkpoints import Checkpoints

    Checkpoints(store, fp).clear()
