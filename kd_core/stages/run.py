"""Running one node, and all of them: the only place where work turns into artifacts.

A node whose record exists is a hit and computes nothing. Everything else (a local loop, Prefect tasks) is a caller of
``run_node`` along ``walk``.
"""

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from kd_core.artifacts import Artifact, Record, expect_identity, find, forget, publish, workspace
from kd_core.errors import QuarantinedError
from kd_core.progress import Ticker
from kd_core.recipe import Recipe
from kd_core.rows.table import RowCache
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.job import Job
from kd_core.store import Store

__all__ = ["STAGES", "StageFunction", "run_node"]

_LOG = logging.getLogger(__name__)

StageFunction = Callable[[Job], dict[str, Any]]

STAGES = (
    "prompts",
    "teacher",
    "answers",
    "curate",
    "soft_labels",
    "hidden_states",
    "vocabulary",
    "train",
    "evaluate",
    "gate",
    "report",
)
"""Each is the function ``<stage>_stage`` of ``kd_core/stages/<stage>.py``, imported when a node of it is computed: a run in which
every stage is a hit imports none of them (nor torch). ``publish`` is given by the caller, since kd_core knows no registry."""


def _function(stage: str) -> StageFunction:
    assert stage in STAGES, f"no stage {stage}"
    function: StageFunction = getattr(importlib.import_module(f"kd_core.stages.{stage}"), f"{stage}_stage")
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
