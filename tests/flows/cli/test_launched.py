"""`kd run` under a launcher: one process runs the recipe, on as many ranks as were asked for; the others end at once."""

import os

import pytest

from flows.cli.launched import as_launched
from kd_core.errors import RecipeError


def launch(monkeypatch: pytest.MonkeyPatch, **environment: int) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, **environment}.items():
        monkeypatch.setenv(name, str(value))


def test_the_first_process_takes_the_number_and_is_no_rank_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RUN_ID=7)
    assert as_launched(["training.steps=3"]) == ["training.steps=3", "run.num_processes=2"]
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(os.environ)


def test_without_a_launcher_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_launched(["training.steps=3"]) == ["training.steps=3"]
    launch(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)
    assert as_launched([]) == []


def test_the_others_have_nothing_to_do(monkeypatch: pytest.MonkeyPatch, kd) -> None:
    launch(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    called = kd("run", "no-such-file.yaml")
    assert (called.code, called.out, called.err) == (0, "", "")


def test_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, RANK=0, WORLD_SIZE=16, LOCAL_RANK=0, LOCAL_WORLD_SIZE=8)
    with pytest.raises(RecipeError, match="launched as 16 processes, 8 of them on this machine: kd trains a student on one machine"):
        as_launched([])
