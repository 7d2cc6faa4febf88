"""Nodes side by side: worker processes that compute nodes of the graph, and the devices that a node claims while it is computed.

A worker is spawned, never forked, has one device and its own threads, and computes one node after another. A node claims one
slot (a GPU, or ``run.threads`` cores), or all of them: a training run on several ranks, and on CPUs whatever measures speed, which
cores that are busy with something else would falsify. What a node computes does not depend on what runs beside it, so the bytes
are those of a run one node at a time.

The first error ends everything, as it does in a run of one process: workers are asked to end first, so that answers which are paid and
the step that was just trained are kept, and killed if they take too long over it.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from kd_core.artifacts import Artifact
from kd_core.errors import KDError
from kd_core.progress import Tick, Ticker
from kd_core.recipe import Recipe, Run
from kd_core.stages.graph import Graph, Node
from kd_core.stages.processes import end_with_parent, how_it_ended
from kd_core.stages.run import StageFunction, run_node
from kd_core.store import Store, open_store

__all__ = ["Workers", "device_slots"]

_ENDING_SECONDS = 10.0
"""For workers that are asked to end: a step to its end, requests that are paid, and a commit."""
_ALL_GPUS = "all"
_Slot = str | None
"""What a worker sees: the name of one GPU, all of them, or (None) only CPUs."""


def device_slots(run: Run) -> list[_Slot]:
    """One entry for each node that may be computed at the same time: the GPU it gets, or None for CPU cores."""
    from kd_core.teacher.models import pick_device  # torch is imported only where something must be computed

    if pick_device(run.device).type != "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [None] * (run.parallel or max(1, cores // (run.threads or cores)))
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [gpus[i % len(gpus)] for i in range(run.parallel or len(gpus))]


class Workers:
    """A fixed number of slots with a worker process each, started when a node needs it. Safe to call from many threads.

    Args:
        recipe: whose nodes are computed.
        slots: what ``device_slots`` found.
        extra: functions of stages that live above kd_core, by stage; module-level ones.
    """

    def __init__(self, recipe: Recipe, slots: list[_Slot], extra: Mapping[str, StageFunction]) -> None:
        self._recipe, self._slots, self._extra = recipe, slots, extra
        self._changed = threading.Condition()
        self._free = list(range(len(slots)))
        self._waiting_for_one: list[int] = []
        self._workers: dict[int, _Worker] = {}
        self._cause: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.end(error or KDError("the run is over"))

    @property
    def ended(self) -> bool:
        """Tell whether an error has ended all work."""
        return self._cause is not None

    def end(self, cause: BaseException) -> None:
        """End every worker. All calls of ``run`` that wait or come later raise the first cause."""
        with self._changed:
            self._cause = self._cause or cause
            self._changed.notify_all()
        workers = list(self._workers.values())
        for worker in workers:
            worker.ask_to_end()
        until = time.monotonic() + _ENDING_SECONDS
        for worker in workers:
            worker.end(max(0.0, until - time.monotonic()))

    def run(self, nodes: Graph, name: str, *, begun: Callable[[], None], tick: Ticker) -> Artifact:
        """Compute a node in a worker process, as soon as its slots are free.

        Args:
            nodes: the recipe's graph.
            name: a node whose upstream nodes are done.
            begun: called in this thread when the node has its slots.
            tick: progress, called in this thread.

        Raises:
            KDError: what the node raised, that its process died, or what ended all work.
        """
        everything = _needs_all(self._recipe, nodes[name], self._slots[0])
        taken = self._claim(list(nodes).index(name), everything=everything)
        try:
            slot = self._slots[taken[0]] if len(taken) == 1 or self._slots[0] is None else _ALL_GPUS
            begun()
            return self._worker(taken[0], slot).run(nodes, name, tick)
        except _DeadWorkerError:
            if self._cause is not None:
                raise self._cause from None
            raise
        finally:
            with self._changed:
                self._free = sorted([*self._free, *taken])
                self._changed.notify_all()

    def _claim(self, order: int, *, everything: bool) -> list[int]:
        """Take one free slot, the first node of the graph first; or all of them once no node waits for just one."""
        with self._changed:
            if not everything:
                self._waiting_for_one.append(order)
            try:
                while self._cause is None:
                    if everything and len(self._free) == len(self._slots) and not self._waiting_for_one:
                        taken, self._free = self._free, []
                        return taken
                    if not everything and self._free and order == min(self._waiting_for_one):
                        return [self._free.pop(0)]
                    self._changed.wait()
                raise self._cause
            finally:
                if not everything:
                    self._waiting_for_one.remove(order)
                self._changed.notify_all()

    def _worker(self, place: int, slot: _Slot) -> "_Worker":
        if slot == _ALL_GPUS:  # workers that hold memory on single GPUs would be in its way
            for other in self._workers.values():
                other.end(0.0)
        worker = self._workers.get(place)
        if worker is None or worker.slot != slot or not worker.alive:
            if worker is not None:
                worker.end(0.0)
            with self._changed:
                if self._cause is not None:
                    raise self._cause
                worker = self._workers[place] = _Worker(self._recipe, slot, self._extra)
        return worker


def _needs_all(recipe: Recipe, node: Node, slot: _Slot) -> bool:
    measures_speed = node.stage == "evaluate" and slot is None
    return measures_speed or (node.stage == "train" and recipe.run.num_processes > 1)


class _DeadWorkerError(KDError):
    """A worker process ended without a word."""


class _Worker:
    """One process that computes nodes, and the line to it. Used by one thread at a time, and ended by any."""

    def __init__(self, recipe: Recipe, slot: _Slot, extra: Mapping[str, StageFunction]) -> None:
        self.slot = slot
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, recipe, slot, dict(extra)))
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        """Tell whether this worker can be given work."""
        return self._process.is_alive()

    def ask_to_end(self) -> None:
        """Send SIGTERM: what is paid or trained is kept, and nothing else is begun."""
        self._process.terminate()

    def end(self, seconds: float) -> None:
        """Wait until it has ended, for so long at most; then kill it, and its open shard or steps since a checkpoint are lost."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()

    def run(self, nodes: Graph, name: str, tick: Ticker) -> Artifact:
        """Hand it a node and relay its progress and warnings until it is done."""
        try:
            self._line.send((dict(nodes), name))
            while True:
                match self._line.recv():
                    case Tick() as found:
                        tick(found)
                    case logging.LogRecord() as record:
                        logging.getLogger(record.name).handle(record)
                    case Artifact() as artifact:
                        return artifact
                    case BaseException() as error:
                        raise error
        except (EOFError, ConnectionError, BrokenPipeError):
            self._process.join()
            how = how_it_ended(self._process.exitcode or 0)
            raise _DeadWorkerError(
                f"{name}: its process {how}, and the run was ended; if memory ran out, lower run.parallel or run.micro_batch_tokens; "
                "run again to go on from what was kept"
            ) from None


class _Forward(logging.Handler):
    """Sends what is logged here to the process that started this one."""

    def __init__(self, line: Connection) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Send it, its message written out: arguments need not be picklable."""
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._line.send(record)


def _serve(line: Connection, recipe: Recipe, slot: _Slot, extra: dict[str, StageFunction]) -> None:
    """Run a worker process: compute nodes one after another, until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the one that started us decides
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stages know an interrupt, and keep what they have
    end_with_parent()
    if slot is not None and slot != _ALL_GPUS:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot  # read when CUDA starts, which nothing has done yet
    logger = logging.getLogger("kd_core")
    logger.addHandler(_Forward(line))
    logger.propagate = False
    store = open_store(recipe.run.store, recipe.run.s3)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            nodes, name = line.recv()
            line.send(_compute(recipe, nodes, name, store, line, extra))


def _compute(recipe: Recipe, nodes: Graph, name: str, store: Store, line: Connection, extra: Mapping[str, StageFunction]) -> Any:
    """The artifact of a node, or the error that it raised, in a form that can be sent."""
    try:
        return run_node(recipe, nodes, name, store=store, tick=line.send, extra=extra)
    except KDError as error:
        return error
    except Exception as error:  # of any library, and maybe not picklable: as text, with its traceback for the log file
        sent = RuntimeError(f"{name}: {type(error).__name__}: {error}")
        sent.add_note(traceback.format_exc())
        return sent
