"""One unit of work on several processes of this machine, its ranks: they are started, watched and ended here.

Ranks meet through a store of this process, so no port is guessed. Rank 0's progress and result are the unit's. The first rank that
fails ends all: nothing waits for a rank that is gone. An interrupt here ends them, and so does the end of this process, however it comes;
SIGTERM is handed to them, so that training leaves a checkpoint first.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore

from kd_core.artifacts import Record
from kd_core.errors import KDError, TrainingError
from kd_core.progress import Tick, silent
from kd_core.recipe import Recipe
from kd_core.stages.graph import Node
from kd_core.stages.job import Job
from kd_core.stages.processes import end_with_parent, how_it_ended
from kd_core.store import open_store
from kd_core.teacher.models import pick_device
from kd_core.train.stopping import Stop, sigterm_waits

__all__ = ["on_ranks"]

Found = TypeVar("Found")

_LAST_WORDS_SECONDS = 2.0
"""Between the first failure and the end of all: the rank that is the cause is not always the one that is heard first."""


def on_ranks(job: Job, function: Callable[[Job, int], Found]) -> Found:
    """Rank 0's result of a job that ``run.num_processes`` processes do together.

    Args:
        job: what to do; rank 0 leaves the files in its directory.
        function: a module's function of (job, rank).

    Raises:
        TrainingError: fewer GPUs than processes, or a rank died.
        KDError: what a rank raised.
        RuntimeError: with the traceback of any other error of a rank.
    """
    num_ranks = job.recipe.run.num_processes
    num_gpus = torch.cuda.device_count()
    if pick_device(job.recipe.run.device).type == "cuda" and num_gpus < num_ranks:
        raise TrainingError(f"run.num_processes: {num_ranks}, each with a GPU of its own, and here are {num_gpus}; lower it")
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    work = (job.recipe, job.node, job.inputs, job.directory)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    voices: dict[Connection, int] = {}
    try:
        for rank in range(num_ranks):
            voice, mouth = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_rank, args=(rank, num_ranks, meeting.port, function, work, mouth))
            process.start()
            mouth.close()
            processes.append(process)
            voices[voice] = rank
        with sigterm_waits() as stop:
            found: Found = _listen(job, processes, voices, stop)
            return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def _listen(job: Job, processes: list[BaseProcess], voices: dict[Connection, int], stop: Stop) -> Any:
    result: Any = None
    failures: dict[int, Exception] = {}
    until = float("inf")
    told = False
    while voices and time.monotonic() < until:
        if stop.requested and not told:  # they end at the end of a step, after a checkpoint
            told = True
            for process in processes:
                process.terminate()
        for voice in wait(list(voices), timeout=0.5):
            assert isinstance(voice, Connection)
            rank = voices[voice]
            try:
                said = voice.recv()
            except EOFError:
                del voices[voice]
                processes[rank].join()
                if (code := processes[rank].exitcode) and rank not in failures:
                    failures[rank] = _death(job, rank, len(processes), code)
                continue
            match said:
                case Tick():
                    job.tick(said)
                case Exception():
                    failures[rank] = said
                case _:
                    result = said
        if failures:
            until = min(until, time.monotonic() + _LAST_WORDS_SECONDS)
    if failures:  # the others fail because of a rank that died, and with errors that are not ours
        raise min(failures.values(), key=lambda error: (not isinstance(error, _DeadRankError), not isinstance(error, KDError)))
    return result


class _DeadRankError(TrainingError):
    """A rank ended without a word."""


def _death(job: Job, rank: int, num_ranks: int, code: int) -> TrainingError:
    return _DeadRankError(
        f"{job.node.name}: rank {rank} of {num_ranks} {how_it_ended(code)}, and the others were ended; if memory ran out, lower "
        "run.micro_batch_tokens or run.num_processes; run again to go on from the newest checkpoint"
    )


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    function: Callable[[Job, int], object],
    work: tuple[Recipe, Node, dict[str, Record], Path],
    mouth: Connection,
) -> None:
    """Run one rank: the body of each process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the one that started us decides
    end_with_parent()
    recipe, node, inputs, directory = work
    threads = recipe.run.threads or max(1, torch.get_num_threads() // num_ranks)
    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is there already
    try:
        if pick_device(recipe.run.device).type == "cuda":
            torch.cuda.set_device(rank)
        store = open_store(recipe.run.store, recipe.run.s3)
        result = function(Job(recipe, node, store, inputs, directory, mouth.send if rank == 0 else silent), rank)
        if rank == 0:
            mouth.send(result)
    except KDError as error:
        mouth.send(error)
        sys.exit(1)
    except Exception:
        mouth.send(RuntimeError(f"rank {rank} of {num_ranks} of {node.name}:\n{traceback.format_exc()}"))
        sys.exit(1)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
