"""Nodes side by side: who runs beside whom, what ends them, and that the bytes are those of a run one node at a time.

Stand-ins for stages meet at files, so that no test depends on how fast a machine is.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from flows.local import run_local
from kd_core.artifacts import Artifact, find
from kd_core.errors import KDError, TrainingError
from kd_core.progress import Tick, silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import Graph, Node, build_graph
from kd_core.stages.job import Job
from kd_core.stages.run import run_node
from kd_core.stages.workers import Workers, device_slots
from kd_core.store import open_store

_LIMIT_SECONDS = 250.0


def _until(condition: Callable[[], bool], what: str = "the other node never came") -> None:
    end = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def _here(job: Job) -> Path:
    folder = Path(job.node.identity["folder"])
    (folder / f"{job.node.name}.pid").write_text(str(os.getpid()))
    return folder


@dataclass(frozen=True)
class Ran:
    """What these stages hand on: who else had begun and not ended."""

    running: tuple[str, ...] = ()


def meet(job: Job) -> Ran:
    """Say that this node runs, and go on once the other one does."""
    folder = _here(job)
    job.tick(Tick(1, 2, "steps"))
    _until(lambda: len(list(folder.glob("*.pid"))) == 2)
    return Ran()


def alone(job: Job) -> Ran:
    """Leave in the summary who else had begun and not ended."""
    folder = _here(job)
    running = [path.stem for path in folder.glob("*.pid") if not (folder / f"{path.stem}.over").exists()]
    (folder / f"{job.node.name}.over").touch()
    return Ran(tuple(sorted(running)))


def hang(job: Job) -> Ran:
    """Run until ended, and keep what is there then, as a stage keeps answers that are paid."""
    folder = _here(job)
    try:
        _until(lambda: False)
    finally:
        (folder / "kept").touch()
    return Ran()


def fail(job: Job) -> Ran:
    """Fail once the other node runs."""
    folder = _here(job)
    _until(lambda: len(list(folder.glob("*.pid"))) == 2)
    raise TrainingError("no such luck")


def die(job: Job) -> Ran:
    """Be killed once the other node runs, as by a machine without memory."""
    folder = _here(job)
    _until(lambda: len(list(folder.glob("*.pid"))) == 2)
    os.kill(os.getpid(), signal.SIGKILL)
    return Ran()


_STAGES = {"meet": meet, "evaluate": alone, "hang": hang, "fail": fail, "die": die}


@pytest.fixture
def recipe(small_recipe: Path, tmp_path: Path) -> Recipe:
    return load_recipe(small_recipe, [f"run.store={tmp_path / 'store'}"])


def _graph(folder: Path, *stages: str) -> Graph:
    folder.mkdir()
    names = [f"node.{i}" for i in range(len(stages))]
    return {
        name: Node(name, "node", stage, {"folder": str(folder)}, {}, {}, f"{i:032x}")
        for i, (name, stage) in enumerate(zip(names, stages, strict=True))
    }


def _run(recipe: Recipe, nodes: Graph, slots: int = 2) -> list[Artifact | BaseException]:
    """What became of each node, all handed out at once."""

    def one(name: str) -> Artifact | BaseException:
        try:
            return workers.run(nodes, name, begun=lambda: None, tick=silent)
        except BaseException as error:
            workers.end(error)
            return error

    with ThreadPoolExecutor() as threads, Workers(recipe, [None] * slots, _STAGES) as workers:
        return list(threads.map(one, nodes))


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_two_nodes_run_at_once_in_processes_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    nodes = _graph(tmp_path / "meeting", "meet", "meet")
    assert all(isinstance(found, Artifact) for found in _run(recipe, nodes))
    pids = {path.read_text() for path in (tmp_path / "meeting").glob("*.pid")}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


def test_what_measures_speed_runs_alone_on_cpus(recipe: Recipe, tmp_path: Path) -> None:
    nodes = _graph(tmp_path / "meeting", "evaluate", "evaluate", "evaluate")
    found = _run(recipe, nodes)
    assert all(isinstance(artifact, Artifact) for artifact in found), found
    store = open_store(recipe.run.store, recipe.run.s3)
    for name, node in nodes.items():
        record = find(store, node.stage, node.fingerprint)
        assert record is not None
        assert record.summary["running"] == [name]


def test_the_first_error_ends_the_others_and_is_what_all_say(recipe: Recipe, tmp_path: Path) -> None:
    found = _run(recipe, _graph(tmp_path / "meeting", "hang", "fail"))
    assert [str(error) for error in found] == ["no such luck"] * 2
    assert (tmp_path / "meeting" / "kept").exists(), "it was asked to end before it was killed"
    assert all(_is_gone(int(path.read_text())) for path in (tmp_path / "meeting").glob("*.pid"))


def test_a_killed_process_is_named(recipe: Recipe, tmp_path: Path) -> None:
    found = _run(recipe, _graph(tmp_path / "meeting", "hang", "die"))
    for error in found:
        assert isinstance(error, KDError)
        assert str(error).startswith("node.1: its process was killed by SIGKILL, and the run was ended")


def test_slots_on_cpus(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def slots(**run: int | None) -> int:
        found = device_slots(recipe.run.model_copy(update={"device": "cpu", **run}))
        assert set(found) == {None}
        return len(found)

    assert slots(parallel=None, threads=3) == 2
    assert slots(parallel=None, threads=None) == 1
    assert slots(parallel=None, threads=16) == 1
    assert slots(parallel=5, threads=16) == 5


@pytest.mark.drill
@dataclass
class _Heard:
    begun: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    most_at_once: int = 0

    def start(self, name: str) -> None:
        self.begun.append(name)
        self.most_at_once = max(self.most_at_once, len(self.begun) - len(self.over))

    def tick(self, name: str, tick: Tick) -> None:
        assert name in self.begun

    def done(self, name: str, artifact: Artifact) -> None:
        self.over.append(name)


@pytest.mark.slow
def test_a_run_side_by_side_leaves_the_same_bytes(small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digests, heard = [], []
    for parallel in (1, 2):
        recipe = load_recipe(
            small_recipe, [f"run.parallel={parallel}", f"run.store=store-{parallel}", "seeds=[0,1]", "run.tracking=sqlite:///x.db"]
        )
        store, listener = open_store(recipe.run.store, recipe.run.s3), _Heard()
        done = run_local(recipe, store, build_graph(recipe, store), listener)
        assert sorted(listener.over) == sorted(done)
        digests.append({name: artifact.digest for name, artifact in done.items() if name not in ("report", "publish")})
        heard.append(listener.most_at_once)
    assert digests[0] == digests[1]
    assert len(digests[0]) >= 12
    assert heard[0] == 1
    assert heard[1] > 1


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_in_the_middle_of_two_leaves_no_process_and_goes_on(
    end: signal.Signals, small_recipe: Path, tmp_path: Path, kd_process: Callable[..., subprocess.Popen[str]]
) -> None:
    overrides = ["run.parallel=2", "seeds=[0,1]", f"run.store={tmp_path / 'store'}"]
    recipe = load_recipe(small_recipe, overrides)
    store = open_store(recipe.run.store, recipe.run.s3)
    nodes = build_graph(recipe, store)
    for name in ("prompts", "teacher", "answers", "curate", "soft_labels"):
        run_node(recipe, nodes, name, store=store, tick=silent, extra={})
    words = ["run", "--local", "--json", small_recipe, *(word for override in overrides for word in ("--set", override))]
    (tmp_path / "held").mkdir()
    process = kd_process(*words, KD_FAILPOINT=f"train.step:3:hold={tmp_path / 'held'}")
    children: list[psutil.Process] = []

    def two_are_held() -> bool:
        children[:] = psutil.Process(process.pid).children(recursive=True)
        return len(list((tmp_path / "held").iterdir())) == 2

    _until(two_are_held, "no two trainings were held")
    process.send_signal(end)
    _, said = process.communicate(timeout=_LIMIT_SECONDS)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    if end == signal.SIGINT:
        assert "Everything that was finished is kept" in said
    _until(lambda: all(_is_gone(child.pid) for child in children), "a worker outlived the run")
    again = kd_process(*words)
    _, said = again.communicate(timeout=_LIMIT_SECONDS)
    assert again.returncode == 0, said
