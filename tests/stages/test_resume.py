"""Broken at any point and started again: finished work stays, the rest is done, the bytes are those of an unbroken run."""

import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kd_core.artifacts import Record, find
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore

SHARD_ROWS, CHECKPOINT_STEPS = 64, 10
TRAINED = ["student.0", "baseline.0", "ablation_hard.0"]


def forget(store: Path, *names: str) -> None:
    """Remove everything below these prefixes of a store."""
    for name in names:
        shutil.rmtree(store / name)


def objects(store: Path, prefix: str) -> set[str]:
    return {path.relative_to(store).as_posix() for path in (store / prefix).rglob("*") if path.is_file()}


def record(recipe: Recipe, store: Path, name: str) -> Record | None:
    node = build_graph(recipe, LocalStore(store))[name]
    return find(LocalStore(store), node.stage, node.fingerprint)


def digests(recipe: Recipe, store: Path, names: Iterable[str]) -> dict[str, str]:
    """Node -> digest over the bytes of all its files; every node must be done."""
    found = {name: record(recipe, store, name) for name in names}
    return {name: done.digest for name, done in found.items() if done is not None}


# ------------------------------------------------------------------------------------------- one break each


@pytest.mark.parametrize(
    ("point", "node", "kept"),
    [
        ("answers.shard:2", "answers", 1 * SHARD_ROWS),
        ("answers.commit:2", "answers", 2 * SHARD_ROWS),
        ("soft_labels.shard:3", "soft_labels", 2 * SHARD_ROWS),
        ("soft_labels.commit:1", "soft_labels", 1 * SHARD_ROWS),
        ("train.step:9", "student.0", 0),
        ("train.step:19", "student.0", 10),
        ("checkpoint.state:2", "student.0", 10),
        ("checkpoint.record:2", "student.0", 20),
    ],
)
def test_a_stage_that_breaks_goes_on_where_it_was(copy, monkeypatch, point, node, kept):
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    unbroken = record(recipe, copy.store, node)
    rows = f"rows/{node}"
    committed = objects(copy.store, rows)
    forget(copy.store, f"artifacts/{unbroken.stage}", *([rows] if committed else []))
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", Counter())
        patch.setenv("KD_FAILPOINT", f"{point}:error")
        with pytest.raises(OSError, match="fail point"):
            run_node(recipe, build_graph(recipe, store), node, store=store, tick=silent, extra={})
    assert record(recipe, copy.store, node) is None, "no record before the end"
    assert objects(copy.store, rows) <= committed
    made = run_node(recipe, build_graph(recipe, store), node, store=store, tick=silent, extra={})
    summary = record(recipe, copy.store, node).summary
    if unbroken.stage == "train":
        assert summary["training"]["resumed_from"] == kept
    else:
        assert summary["shards"]["rows_computed"] == summary["shards"]["rows"] - kept > 0
    assert made.digest == unbroken.digest
    assert objects(copy.store, rows) == committed, "shard for shard the bytes of an unbroken run"


# ------------------------------------------------------------------------------------------- kill -9 and signals


@pytest.mark.drill
@pytest.mark.slow
def test_a_run_killed_six_times_ends_with_the_bytes_of_an_unbroken_one(copy, finished, kd_process, monkeypatch):
    """SIGKILL to the real program, each time the same command: what was finished is never done again."""
    forget(copy.store, "rows", *(f"artifacts/{stage}" for stage in ("answers", "curate", "soft_labels", "train", "evaluate", "gate")))
    command = ("run", "--local", "--json", copy.recipe_file)
    kept: set[str] = set()

    def killed_at(point: str) -> None:
        nonlocal kept
        process = kd_process(*command, KD_FAILPOINT=f"{point}:kill", MLFLOW_TRACKING_URI=finished.tracking)
        _, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        now = objects(copy.store, "rows")
        assert kept <= now, "a finished shard is never lost"
        kept = now

    def count(table: str, kind: str) -> int:
        return sum(f"/{table}/" in name and f"/{kind}/" in name for name in kept)

    def checkpoints() -> list[int]:
        found = (copy.store / "checkpoints").glob("*/*/record.json")
        return sorted(int(path.parent.name) for path in found)

    killed_at("answers.shard:2")
    assert (count("answers", "shards"), count("answers", "commits")) == (2, 1)
    killed_at("answers.commit:2")
    assert count("answers", "commits") == 3
    killed_at("soft_labels.commit:2")
    assert count("soft_labels", "commits") == 2
    killed_at("train.step:12")
    assert checkpoints() == [10]
    killed_at("checkpoint.state:1")
    assert checkpoints() == [10], "step 20 has a state and no record: it does not count"
    killed_at("checkpoint.record:1")
    assert checkpoints() == [10, 20]

    process = kd_process(*command, MLFLOW_TRACKING_URI=finished.tracking)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    recipe = load_recipe(copy.recipe_file)
    assert record(recipe, copy.store, "student.0").summary["training"]["resumed_from"] == 20
    rows = {name: record(recipe, copy.store, name).summary["shards"] for name in ("answers", "soft_labels")}
    assert {name: s["rows"] - s["rows_computed"] for name, s in rows.items()} == {"answers": 3 * SHARD_ROWS, "soft_labels": 2 * SHARD_ROWS}
    names = ["answers", "curate", "soft_labels", *TRAINED, *(f"evaluate.{m}" for m in ("teacher", "student", "baseline", "ablation_hard"))]
    unbroken = {node["name"]: node["digest"] for node in finished.said["nodes"]}
    assert digests(recipe, copy.store, names) == {name: unbroken[name] for name in names}
    assert objects(copy.store, "rows") == objects(finished.store, "rows")
    assert objects(copy.store, "checkpoints") == set()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.drill
@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(copy, kd, kd_process, tmp_path):
    """Twice in the twelfth step that a process makes, where it is held: after step 12, and after step 22."""
    changes = ("--set", "training.steps=40", "--set", "evaluation.compare=[]")
    words = ["run", "--local", str(copy.recipe_file), *changes]

    def newest() -> int:
        return max((int(path.parent.name) for path in (copy.store / "checkpoints").glob("*/*/record.json")), default=0)

    for number in (signal.SIGINT, signal.SIGTERM):
        held = tmp_path / number.name
        held.mkdir()
        process = kd_process(*words, KD_FAILPOINT=f"train.step:12:hold={held}")
        wait_for(lambda held=held: any(held.iterdir()), process)
        process.send_signal(number)
        if number == signal.SIGTERM:  # which waits for the end of the step
            next(held.iterdir()).unlink()
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (130, "")
        [line] = [line for line in err.splitlines() if not line.startswith(("+ ", "= ", "  "))]
        assert line.startswith("kd: stopped.")
        _, *again = shlex.split(line.partition(":  ")[2])
        assert again == words
    stopped = newest()
    [training] = [row for row in json.loads(kd("status", "--json", *words[2:]).out)["nodes"] if row["name"] == "student.0"]
    assert (training["status"], training["resumes_at_step"]) == ("started", stopped)
    called = kd(*again, "--json")
    assert called.code == 0, called.err
    summary = record(load_recipe(copy.recipe_file, changes[1::2]), copy.store, "student.0").summary
    assert summary["training"]["resumed_from"] == stopped == 22, "SIGTERM left a checkpoint after the step at work"


# ------------------------------------------------------------------------------------------- damaged bytes


def flip(path: Path) -> Path:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("pattern", "reader"),
    [
        ("artifacts/teacher/*/*/model/model.safetensors", "evaluate"),
        ("artifacts/prompts/*/*/prompts.parquet", "curate"),
        ("artifacts/curate/*/record.json", None),
    ],
)
def test_a_flipped_bit_is_named_and_following_the_advice_heals_it(copy, finished, kd, monkeypatch, pattern, reader):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking)  # the publication is done there
    damaged = flip(min(copy.store.glob(pattern)))
    if reader is not None:
        forget(copy.store, f"artifacts/{reader}")
    before = objects(copy.store, "")
    called = kd("run", "--local", "--json", copy.recipe_file)
    assert (called.code, called.out) == (1, "")
    [line] = called.err.splitlines()
    assert line.startswith(f"kd: {damaged}: ")
    assert objects(copy.store, "artifacts/train") <= before, "nothing was trained on it"
    command = re.search(r"kd (cache repair --store \S+ --yes)", line)[1]
    assert kd(*command.split()).code == 0
    called = kd("run", "--local", "--json", copy.recipe_file)
    assert (called.code, called.err) == (0, "")
    nodes = {node["name"]: node["digest"] for node in json.loads(called.out)["nodes"]}
    assert nodes == {node["name"]: node["digest"] for node in finished.said["nodes"]}


@pytest.mark.parametrize(("table", "reader"), [("answers", "curate"), ("soft_labels", "train")])
def test_a_flipped_bit_in_the_teachers_rows_is_told_and_heals_itself(copy, finished, kd, monkeypatch, table, reader):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking)
    damaged = flip(min(copy.store.glob(f"rows/{table}/*/shards/*.parquet")))
    forget(copy.store, f"artifacts/{reader}")
    called = kd("run", "--local", "--json", copy.recipe_file)
    assert called.code == 0
    [line] = called.err.splitlines()
    assert f"{damaged}: " in line
    assert "it was moved to quarantine/" in line
    nodes = {node["name"]: node["digest"] for node in json.loads(called.out)["nodes"]}
    assert nodes == {node["name"]: node["digest"] for node in finished.said["nodes"]}


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(copy, monkeypatch, caplog):
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    unbroken = record(recipe, copy.store, "student.0")
    forget(copy.store, "artifacts/train")
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", Counter())
        patch.setenv("KD_FAILPOINT", "train.step:22:error")
        with pytest.raises(OSError, match="fail point"):
            run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={})
    damaged = flip(next(copy.store.glob("checkpoints/*/00000020/*.pt")))
    caplog.clear()
    made = run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={})
    assert (made.digest, record(recipe, copy.store, "student.0").summary["training"]["resumed_from"]) == (unbroken.digest, 10)
    [line] = [record.getMessage() for record in caplog.records if str(damaged) in record.getMessage()]
    assert "training goes on from an older checkpoint" in line


def test_sigterm_leaves_a_checkpoint_after_the_step_at_work(copy, finished, kd_process, monkeypatch):
    """The signal comes in step 13, by a fail point; the next run goes on after it, to the bytes of an unbroken one."""
    forget(copy.store, "artifacts/train")
    command = ("run", "--local", "--json", copy.recipe_file)
    process = kd_process(*command, KD_FAILPOINT="train.step:13:term", MLFLOW_TRACKING_URI=finished.tracking)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("kd: stopped. Everything that was finished is kept")
    assert sorted(path.parent.name for path in copy.store.glob("checkpoints/*/*/record.json")) == ["00000010", "00000013"]
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    made = run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={})
    assert record(recipe, copy.store, "student.0").summary["training"]["resumed_from"] == 13
    assert made.digest == {node["name"]: node["digest"] for node in finished.said["nodes"]}["student.0"]


def test_a_clock_that_jumps_changes_nothing(copy, finished, monkeypatch):
    """Hours forth and back at every look: the same bytes, steps and checkpoints."""
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    before = record(recipe, copy.store, "student.0")
    forget(copy.store, "artifacts/train")
    jumps = itertools.cycle((3600.0, -90_000.0, 0.0, 1e9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    made = run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={})
    after = record(recipe, copy.store, "student.0")
    assert made.digest == before.digest
    mine, theirs = after.summary["training"], before.summary["training"]
    assert (mine["steps"], mine["kept_step"]) == (theirs["steps"], theirs["kept_step"])
    assert [line["step"] for line in mine["speed"]] == [line["step"] for line in theirs["speed"]]
    assert objects(copy.store, "") >= {after.key}
    assert not (copy.store / "checkpoints").exists() or objects(copy.store, "checkpoints") == set()


@pytest.mark.drill
@pytest.mark.slow
def test_sigterm_reaches_the_ranks_and_leaves_a_checkpoint(copy, finished, kd_process):
    """Each rank has the signal in step 13; they agree where to end, and the next run goes on there."""
    forget(copy.store, "artifacts/train")
    command = ("run", "--local", "--json", copy.recipe_file, "--set", "run.num_processes=2")
    process = kd_process(*command, KD_FAILPOINT="train.step:13:term", MLFLOW_TRACKING_URI=finished.tracking)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "was killed by SIGTERM" in err
    assert sorted(path.parent.name for path in copy.store.glob("checkpoints/*/*/record.json")) == ["00000010", "00000013"]
