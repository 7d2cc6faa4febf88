"""Every kind of object, damaged in every way, under every command that looks: it is named, or what the command says is true without it.

``verify`` names all of it. ``run``, ``status`` and ``report`` name what they use before they use it; the others of what they say is
held against the finished run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kd_core.artifacts import Artifact, find
from kd_core.ledger import Entry, append
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore
from kd_core.train.checkpoints import Checkpoints


def _flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _swap(path: Path, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    assert mine != theirs
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {"flip": _flip, "cut": _cut, "delete": _delete, "swap": _swap}
ALL = ("verify", "run", "status", "report")
SIZED = ("verify", "run", "status")
"""What names a file of another size, or none, without a look inside."""


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    Attributes:
        path: of one of it in the store, as a pattern in which {student} and its like are fingerprints.
        other: of another one, to swap with.
        named: damage -> the commands that must name it; verify names each, unless it stands here.
    """

    path: str
    other: str
    named: dict[str, frozenset[str]]


def _named(*commands: str, but: dict[str, tuple[str, ...]] | None = None) -> dict[str, frozenset[str]]:
    given = {damage: frozenset(commands) for damage in DAMAGES}
    return given | {damage: frozenset(those) for damage, those in (but or {}).items()}


KINDS = {
    "record of the student": Kind(
        "artifacts/train/{student.0}/record.json",
        "artifacts/train/{baseline.0}/record.json",
        _named(*ALL, but={"delete": ("verify",)}),
    ),
    "record of the gate": Kind(
        "artifacts/gate/{gate}/record.json",
        "artifacts/report/{report}/record.json",
        _named("verify", "run", "status", but={"delete": ("verify",), "swap": ALL}),
    ),
    "record of the publication": Kind(
        "artifacts/publish/{publish}/record.json", "artifacts/gate/{gate}/record.json", _named(*ALL, but={"delete": ()})
    ),
    "weights of the champion": Kind(
        "artifacts/train/{student.0}/*/model/model.safetensors",
        "artifacts/train/{ablation_hard.0}/*/model/model.safetensors",
        _named(*SIZED, but={"flip": ("verify", "run"), "swap": ("verify", "run")}),
    ),
    "weights of the teacher": Kind(
        "artifacts/teacher/{teacher}/*/model/model.safetensors",
        "artifacts/train/{student.0}/*/model/model.safetensors",
        _named(*SIZED, but={"flip": ("verify",)}),
    ),
    "file of the report": Kind(
        "artifacts/report/{report}/*/report.json",
        "artifacts/report/{report}/*/report.md",
        _named(*ALL, but={"flip": ("verify", "report")}),
    ),
    "ledger entry": Kind("ledger/small-student/000001.json", "ledger/another/000001.json", _named(*ALL)),
    "commit": Kind("rows/soft_labels/*/commits/*.json", "rows/answers/*/commits/*.json", _named("verify")),
    "shard": Kind("rows/soft_labels/*/shards/*.parquet", "rows/answers/*/shards/*.parquet", _named("verify")),
    "description": Kind("rows/soft_labels/*/about.json", "rows/answers/*/about.json", _named("verify")),
    "record of a checkpoint": Kind(
        "checkpoints/{student.0}/00000020/record.json", "checkpoints/{student.0}/00000010/record.json", _named("verify", but={"delete": ()})
    ),
    "state of a checkpoint": Kind("checkpoints/{student.0}/00000020/*.pt", "checkpoints/{student.0}/00000010/*.pt", _named("verify")),
}


def _path(store: Path, pattern: str, fingerprints: dict[str, str]) -> Path:
    for name, fingerprint in fingerprints.items():
        pattern = pattern.replace(f"{{{name}}}", fingerprint)
    return min(store.glob(pattern))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_before_use(copy, finished, kd, monkeypatch, kind: str, damage: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.tracking)  # the publication is done there
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    student = next(node for node in finished.said["nodes"] if node["name"] == "student.0")
    artifact = Artifact("train", student["fingerprint"], student["digest"])
    append(store, "another", Entry("another", "promote", artifact, ("it is good",), None, 0))
    if "checkpoint" in kind:
        for step in (10, 20):
            Checkpoints(store, _nodes(finished)["student.0"]).save(step, {"step": step})
    path, other = (_path(copy.store, pattern, _nodes(finished)) for pattern in (KINDS[kind].path, KINDS[kind].other))
    key = path.relative_to(copy.store).as_posix()
    assert len(build_graph(recipe, store)) == len(finished.said["nodes"])
    DAMAGES[damage](path, other)
    must = KINDS[kind].named[damage]

    found = json.loads(kd("cache", "verify", "--json").out)["damage"]
    named = key in json.dumps(found) or ((kind, damage) == ("commit", "delete") and "in no commit" in json.dumps(found))
    assert named == ("verify" in must)
    for command in ("status", "report", "run"):
        if (kind, command, damage) == ("record of the publication", "run", "delete"):
            continue  # it is published again: into the registry that all tests share
        words = (*(("run", "--local") if command == "run" else (command,)), "--json", copy.recipe_file)
        called = kd(*words)
        if command in must:
            assert called.code == 1, command
            assert key in called.err or (damage == "swap" and other.relative_to(copy.store).as_posix() in called.err), command
            assert called.out == "", command
        elif called.code == 0:
            _check(command, json.loads(called.out), finished, gone=key if damage == "delete" else None)
        else:
            assert damage == "delete", called.err
            assert f"has no report in {copy.store}" in called.err


def _nodes(finished) -> dict[str, str]:
    return {node["name"]: node["fingerprint"] for node in finished.said["nodes"]}


def _check(command: str, said: dict, finished, *, gone: str | None) -> None:
    """What a command says is what is true."""
    if command == "status":
        missing = {node["name"] for node in said["nodes"] if node["status"] != "done"}
        named = {name for name, fingerprint in _nodes(finished).items() if gone is not None and gone.endswith(f"{fingerprint}/record.json")}
        assert named <= missing
        assert bool(missing) == bool(named)
    elif command == "report":
        record = find(LocalStore(finished.store), "report", _nodes(finished)["report"])
        assert record is not None
        assert said == json.loads((finished.store / record.prefix / "report.json").read_text())
    else:
        assert {node["name"]: node["digest"] for node in said["nodes"]} == {n["name"]: n["digest"] for n in finished.said["nodes"]}
        assert said["verdict"] == finished.said["verdict"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_where_status_says_a_run_goes_on(copy, finished, kd, damage: str) -> None:
    """Status names the whole one, which is where training would go on."""
    store, student = LocalStore(copy.store), _nodes(finished)["student.0"]
    store.delete(f"artifacts/train/{student}/record.json")
    for step in (5, 10, 20):
        Checkpoints(store, student, keep=3).save(step, {"step": step})
    path, other = (min((copy.store / f"checkpoints/{student}").glob(f"{step:08d}/*.pt")) for step in (20, 10))
    DAMAGES[damage](path, other)
    rows = {node["name"]: node for node in json.loads(kd("status", "--json", copy.recipe_file).out)["nodes"]}
    assert rows["student.0"]["status"] == "started"
    assert rows["student.0"]["resumes_at_step"] == (5 if damage == "swap" else 10)
