"""Checkpoints: only complete ones count, the newest wins, damage is named, two are kept."""

import json
from pathlib import Path

import pytest
import torch

from kd_core.errors import IntegrityError, VersionError
from kd_core.store import LocalStore
from kd_core.train.checkpoints import Checkpoints

CPU = torch.device("cpu")


def state(value: float) -> dict[str, object]:
    return {"model": {"w": torch.full((3,), value)}, "metrics": "[]", "tokens": int(value)}


def test_the_newest_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(LocalStore(tmp_path), "f" * 32)
    assert checkpoints.load_newest(CPU) is None
    for step in (5, 10, 15):
        checkpoints.save(step, state(step / 3))
    found = checkpoints.load_newest(CPU)
    assert found is not None
    assert (found[0], found[1]["tokens"]) == (15, 5)
    assert torch.equal(found[1]["model"]["w"], torch.full((3,), 5.0))
    assert checkpoints.steps() == [10, 15]
    assert len(list(checkpoints.store.list("checkpoints/"))) == 4


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    mine, other = Checkpoints(store, "a" * 32), Checkpoints(store, "b" * 32)
    mine.save(1, state(1))
    assert other.load_newest(CPU) is None
    other.save(2, state(2))
    mine.clear()
    assert mine.steps() == []
    assert other.steps() == [2]


@pytest.mark.parametrize(("point", "resumes_at"), [("checkpoint.state", 5), ("checkpoint.record", 10)])
def test_a_checkpoint_counts_once_its_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, resumes_at: int
) -> None:
    checkpoints = Checkpoints(LocalStore(tmp_path), "f" * 32)
    checkpoints.save(5, state(5))
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", {point: 0})
        patch.setenv("KD_FAILPOINT", f"{point}:1:error")
        with pytest.raises(OSError, match="fail point"):
            checkpoints.save(10, state(10))
    found = checkpoints.load_newest(CPU)
    assert found is not None
    assert found[0] == resumes_at
    checkpoints.save(10, state(10))
    assert checkpoints.steps() == [5, 10]


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _swap(file: Path) -> None:
    """With the same object of the other checkpoint."""
    [other] = [path for path in file.parent.parent.rglob(f"*{file.suffix}") if path != file]
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


@pytest.mark.parametrize("kind", ["record.json", "*.pt"])
@pytest.mark.parametrize("damage", [_flip, _cut, _empty, Path.unlink, _swap], ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_checkpoint_is_told_once_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, damage) -> None:
    """For the older whole one; where both are damaged, for the beginning. It is then written anew."""
    checkpoints = Checkpoints(LocalStore(tmp_path), "f" * 32)
    for step in (7, 14):
        checkpoints.save(step, state(step))
    [file] = tmp_path.glob(f"checkpoints/*/00000014/{kind}")
    damage(file)
    found = checkpoints.load_newest(CPU)
    told = [record.getMessage() for record in caplog.records]
    if damage is _swap:
        assert found is None
        assert [str(step) in line for step, line in zip(("00000014/", "00000007/"), told, strict=True)] == [True, True]
    else:
        assert found is not None
        assert found[0] == 7
        if (kind, damage) == ("record.json", Path.unlink):  # without a record there is no checkpoint
            assert told == []
        else:
            [line] = told
            assert str(file) in line
            with pytest.raises(IntegrityError, match=file.name):
                checkpoints.check(14)
    checkpoints.save(14, state(14))
    found = checkpoints.load_newest(CPU)
    assert found is not None
    assert (found[0], found[1]["tokens"]) == (14, 14)


def test_what_is_not_tensors_and_plain_values_is_not_unpickled(tmp_path: Path) -> None:
    checkpoints = Checkpoints(LocalStore(tmp_path), "f" * 32)
    checkpoints.save(1, {"model": Path("x")})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoints.load_newest(CPU)


@pytest.mark.parametrize("left", [[], [5]])
def test_a_checkpoint_that_another_worker_removes_meanwhile_is_passed_over(tmp_path: Path, left: list[int]) -> None:
    """Two workers of one run: the first ends, and clears up, between the second's listing and its reading."""
    theirs = Checkpoints(LocalStore(tmp_path), "f" * 32)

    class SlowStore(LocalStore):
        def get(self, key: str) -> bytes:
            theirs.clear()
            for step in left:
                theirs.save(step, state(step))
            return super().get(key)

    for step in (5, 10):
        theirs.save(step, state(step))
    found = Checkpoints(SlowStore(tmp_path), "f" * 32).load_newest(CPU)
    assert ([] if found is None else [found[0]]) == left


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(LocalStore(tmp_path), "f" * 32)
    checkpoints.save(7, state(7))
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["version"] == 1
    record.write_text(json.dumps({**json.loads(record.read_text()), "version": 7}))
    said = "00000007/record.json: a checkpoint of version 7; this code reads version 1; update the package"
    with pytest.raises(VersionError, match=said):
        checkpoints.load_newest(CPU)


def test_as_many_are_kept_as_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(LocalStore(tmp_path), "f" * 32, keep=1)
    for step in (5, 10):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [10]
