"""Computing one node: the only place where work turns into artifacts.

A node whose record exists is a hit and computes nothing; its files must be there with their sizes. Everything else (a local run, worker
processes, Prefect tasks) is a caller of ``run_node``; what follows what is ``order.py``'s business.
"""

import importlib
import logging
import time
from collections.abc import Callable, Mapping

from kd_core.artifacts import Artifact, Record, check_bytes, check_sizes, forget, open_artifact, publish, workspace
from kd_core.errors import QuarantinedError
from kd_core.ledger import current
from kd_core.progress import Ticker
from kd_core.recipe import Recipe
from kd_core.rows.table import RowCache
from kd_core.stages.graph import Graph, find_node, open_node, selected_student
from kd_core.stages.job import Job
from kd_core.store import Store
from kd_core.summaries import Summary, plain, shards_of

__all__ = ["STAGES", "StageFunction", "found_done", "rows_are_there", "run_node"]

_LOG = logging.getLogger(__name__)

StageFunction = Callable[[Job], Summary]

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


def run_node(recipe: Recipe, nodes: Graph, name: str, *, store: Store, tick: Ticker, extra: Mapping[str, StageFunction]) -> Artifact:
    """Compute one node, or find it done.

    A damaged shard that the node meets is moved aside; the stage that made it computes its rows again, once, and the
    node goes on from its checkpoint.

    Args:
        recipe: the recipe.
        nodes: its graph.
        name: a node of the graph; all its upstream nodes must be done.
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
        return _run_once(recipe, nodes, name, store=store, tick=tick, extra=extra)
    except QuarantinedError as damage:
        _LOG.warning("%s: %s", name, damage)
        for upstream in nodes[name].upstream.values():
            record = find_node(store, nodes[upstream])
            if record is not None and rows_are_there(store, record):
                continue
            if record is not None:  # None: another node met the same damage, and its upstream is made again already
                forget(store, record)
            run_node(recipe, nodes, upstream, store=store, tick=tick, extra=extra)
        return _run_once(recipe, nodes, name, store=store, tick=tick, extra=extra)


def found_done(recipe: Recipe, store: Store, nodes: Graph, name: str) -> Artifact | None:
    """The artifact of a node that need not be computed; None if it must be.

    Raises:
        IntegrityError: a file of it is gone or has another size; of a publication, the student or the champion is damaged.
    """
    node = nodes[name]
    record = find_node(store, node)
    if record is None:
        return None
    check_sizes(store, record)
    if node.stage == "publish":
        check_pointed_to(recipe, store, nodes)
    return Artifact(node.stage, node.fingerprint, record.digest, record.seconds, hit=True)


def rows_are_there(store: Store, record: Record) -> bool:
    """Tell whether every shard that a record froze is still committed; True for a stage without shards."""
    shards = shards_of(record)
    if shards is None:
        return True
    held = {commit.sha256 for commit in RowCache(store, record.stage, shards.namespace).snapshot().commits}
    return held.issuperset(shards.commits)


def _run_once(recipe: Recipe, nodes: Graph, name: str, *, store: Store, tick: Ticker, extra: Mapping[str, StageFunction]) -> Artifact:
    node = nodes[name]
    if (done := found_done(recipe, store, nodes, name)) is not None:
        return done
    inputs = {role: open_node(store, nodes[upstream]) for role, upstream in node.upstream.items()}
    began = time.perf_counter()
    if recipe.run.threads is not None:
        importlib.import_module("torch").set_num_threads(recipe.run.threads)
    with workspace() as directory:
        job = Job(recipe, node, store, inputs, directory, tick)
        summary = (extra[node.stage] if node.stage in extra else _function(node.stage))(job)
        record = publish(
            store,
            directory,
            stage=node.stage,
            fp=node.fingerprint,
            identity=node.identity,
            upstream=node.above,
            summary=plain(summary),
            seconds=time.perf_counter() - began,
        )
    if node.stage in ("teacher", "train"):
        _forget_checkpoints(store, node.fingerprint)
    return Artifact(node.stage, node.fingerprint, record.digest, record.seconds, hit=False)


READ_AGAIN_BYTES = 256 << 20
"""Weights up to this size are read whole each time a finished run says what it published (0.2 s on a local disk); of larger ones
presence and sizes are checked, and ``kd cache verify`` reads them. Before a publication every byte is read, whatever the size."""


def check_pointed_to(recipe: Recipe, store: Store, nodes: Graph) -> None:
    """Check the weights that a finished publication points to: the student's, and the champion's.

    Raises:
        ArtifactError: the champion's record is gone, or of other bytes.
        IntegrityError: a file is gone, or is not as recorded.
    """
    student, holder = selected_student(recipe, store, nodes), current(store, recipe.publish)
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
