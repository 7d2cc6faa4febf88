"""What MLflow holds after a publication, against real databases and a real server; after crashes at every write too."""

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kd_core.errors import KDError
from tasks.tracking import DatasetInfo, ModelInfo, Publication, Published, StageRun, default_tracking_uri, publish_run

WRITES = (
    "create_experiment",
    "create_run",
    "log_batch",
    "log_inputs",
    "log_artifacts",
    "set_tag",
    "set_terminated",
    "create_registered_model",
    "create_model_version",
    "set_model_version_tag",
    "set_registered_model_alias",
)


def publication(
    name: str, *, source: str = "s3://bucket/kd/artifacts/student/0a/f0", promote: bool = True, key: str = "0a" * 16
) -> Publication:
    return Publication(
        name=name,
        run_key=key,
        parameters={"teacher.model": "big", "seeds": "0,1"},
        tags={"kd.recipe": name},
        stages=(
            StageRun("answers", "a1", {"rows": "12"}, {"rows_kept": 10.0}, {}, 2.0, "computed"),
            StageRun("student", "b2", {}, {"final_loss": 0.5}, {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)]}, 3.0, "reused"),
        ),
        datasets=(DatasetInfo("prompts", "d" * 32, "s3://bucket/prompts", 12, "training"),),
        artifacts={"report.html": "<p>é</p>", "report.json": b"{}"},
        model=ModelInfo(
            name + "-student", source, {"kd.digest": "f0"}, promote, ["better than baseline", "small enough"], {"pass_at_1": 0.75}
        ),
    )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One migrated database, in a directory that did not exist."""
    path = tmp_path_factory.mktemp("tracking") / "not" / "yet" / "mlflow.db"
    publish_run(f"sqlite:///{path}", replace(publication("first"), stages=(), datasets=(), artifacts={}))
    return path


@pytest.fixture
def uri(database: Path) -> str:
    return f"sqlite:///{database}"


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def state(uri: str, name: str, *, ids: bool = True) -> dict[str, Any]:
    """Everything MLflow holds under an experiment and its model; without ids and clock for comparing two histories."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id: run.data.tags.get("kd.run_key") for run in found}
    runs = {}
    for run in found:
        history = {k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)] for k in run.data.metrics}
        tags = dict(run.data.tags)
        parent = parents.get(tags.pop("mlflow.parentRunId", ""))
        datasets = [
            (d.dataset.name, d.dataset.digest, d.dataset.source, d.dataset.profile, d.tags[0].value) for d in run.inputs.dataset_inputs
        ]
        files = {f.path: f.file_size for f in client.list_artifacts(run.info.run_id)}
        clock = (run.info.run_id, run.info.start_time, run.info.end_time) if ids else None
        duration = run.info.end_time - run.info.start_time
        key = tags.get("kd.run_key") or f"{tags['kd.step_key']} of {parent}"
        assert key not in runs, "a run stands twice"
        runs[key] = (run.info.status, duration, run.data.params, tags, sorted(history.items()), datasets, files, clock)
    versions = [
        (v.version, v.source, v.tags, v.run_id if ids else None, v.last_updated_timestamp if ids else None)
        for v in client.search_model_versions(f"name = '{name}-student'")
    ]
    return {"runs": runs, "versions": versions, "aliases": client.get_registered_model(f"{name}-student").aliases}


def test_everything_arrives_and_a_second_call_changes_nothing(uri: str, database: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = publication("whole")
    published = publish_run(uri, wanted)
    assert published == Published(published.run_id, None, 1, 1)
    before = state(uri, "whole")
    runs = before["runs"]
    answers, student = f"a1 of {wanted.run_key}", f"b2 of {wanted.run_key}"
    assert set(runs) == {wanted.run_key, answers, student}
    status, duration, params, tags, metrics, datasets, files, _ = runs[wanted.run_key]
    assert (status, duration, params) == ("FINISHED", 5000, {"teacher.model": "big", "seeds": "0,1"})
    assert tags["kd.recipe"] == "whole"
    assert metrics == [("pass_at_1", [(0, 0.75)])]
    assert datasets == [("prompts", "d" * 32, '{"uri": "s3://bucket/prompts"}', '{"num_rows": 12}', "training")]
    assert files == {"report.html": 9, "report.json": 2}
    assert runs[answers][:3] == ("FINISHED", 2000, {"rows": "12"})
    assert runs[student][1] == 3000
    assert runs[student][3]["kd.status"] == "reused"
    assert runs[student][4] == [("final_loss", [(0, 0.5)]), ("loss", [(1, 3.0), (2, 2.0), (3, 1.0)])]
    assert client_of(uri).get_parent_run(runs[student][7][0]).info.run_id == published.run_id
    (version,) = before["versions"]
    assert version[1] == wanted.model.source
    assert version[2] == {
        "kd.digest": "f0",
        "kd.source": wanted.model.source,
        "kd.verdict": "promote",
        "kd.reasons": "better than baseline\nsmall enough",
    }
    assert version[3] == published.run_id
    assert (database.parent / "mlruns" / published.run_id / "artifacts" / "report.html").read_text() == "<p>é</p>"
    assert publish_run(uri, wanted) == published
    assert state(uri, "whole") == before
    assert capfd.readouterr() == ("", "")


def test_only_newer_steps_are_logged_and_the_first_record_of_a_stage_stays(uri: str) -> None:
    first = publication("longer")
    publish_run(uri, first)
    longer = replace(first.stages[1], series={"loss": [(2, 9.0), (3, 9.0), (4, 0.5)]}, seconds=99.0, metrics={"final_loss": 9.0})
    publish_run(uri, replace(first, stages=(first.stages[0], longer), tags={"kd.recipe": "renamed"}))
    runs = state(uri, "longer")["runs"]
    assert runs[f"b2 of {first.run_key}"][4] == [("final_loss", [(0, 0.5)]), ("loss", [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)])]
    assert runs[f"b2 of {first.run_key}"][1] == 3000
    assert runs[first.run_key][3]["kd.recipe"] == "renamed"


def test_champion_moves_only_on_promotion_and_challenger_always(uri: str) -> None:
    first = publication("moves", source="s3://b/1", promote=False, key="01" * 16)
    assert publish_run(uri, first).champion_version is None
    second = publication("moves", source="s3://b/2", promote=True, key="02" * 16)
    assert publish_run(uri, second).champion_version == 2
    third = publication("moves", source="s3://b/3", promote=False, key="03" * 16)
    published = publish_run(uri, third)
    assert (published.version, published.champion_version) == (3, 2)
    assert {k: int(v) for k, v in state(uri, "moves")["aliases"].items()} == {"challenger": 3, "champion": 2}


def test_the_same_bytes_under_another_run_are_the_same_version(uri: str) -> None:
    first = publish_run(uri, publication("same", promote=False, key="01" * 16))
    second = publish_run(uri, publication("same", promote=True, key="02" * 16))
    assert first.run_id != second.run_id
    assert (second.version, second.champion_version) == (1, 1)
    ((_, _, tags, _, _),) = state(uri, "same")["versions"]
    assert tags["kd.verdict"] == "promote", "the newest verdict"


def test_a_local_payload_keeps_its_path_in_a_database(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    (tmp_path / "it's a model").mkdir()
    (tmp_path / "it's a model" / "model.safetensors").write_bytes(b"weights")
    source = str(tmp_path / "it's a model")
    assert publish_run(uri, publication("local", source=source)).version == 1
    assert publish_run(uri, publication("local", source=source)).version == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = mlflow.artifacts.download_artifacts("models:/local-student@champion")
    assert Path(found, "model.safetensors").read_bytes() == b"weights"


def crash(monkeypatch: pytest.MonkeyPatch, nth: int) -> Callable[[], int]:
    """Die instead of doing the nth write (which is right after the one before); returns a counter of writes."""
    from mlflow import MlflowClient

    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    return lambda: count


def test_a_crash_at_any_write_converges(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def described(name: str) -> str:
        return json.dumps(state(uri, name, ids=False), sort_keys=True).replace(name, "NAME")

    with monkeypatch.context() as patch:
        writes = crash(patch, 0)
        publish_run(uri, publication("clean"))
    assert writes() >= 17
    expected = described("clean")
    for nth in range(1, writes() + 1):
        with monkeypatch.context() as patch:
            crash(patch, nth)
            with pytest.raises(KeyboardInterrupt):
                publish_run(uri, publication(f"crash-{nth}"))
        publish_run(uri, publication(f"crash-{nth}"))
        assert described(f"crash-{nth}") == expected, f"write {nth}"


def test_environment_and_loggers_are_as_before(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.utils.logging_utils import MLFLOW_LOGGING_STREAM

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    before = dict(os.environ)
    level = logging.getLogger("urllib3").level
    publish_run(uri, publication("manners"))
    assert dict(os.environ) == before
    assert (logging.getLogger("urllib3").level, MLFLOW_LOGGING_STREAM.enabled) == (level, True)


def test_a_metric_that_is_also_a_series_is_refused(uri: str) -> None:
    wanted = publication("twice")
    stage = replace(wanted.stages[1], metrics={"loss": 1.0})
    with pytest.raises(KDError, match="stage student: loss is both"):
        publish_run(uri, replace(wanted, stages=(stage,)))


def test_a_deleted_experiment_is_named(uri: str) -> None:
    publish_run(uri, publication("gone"))
    client = client_of(uri)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(KDError, match=r"experiment 'gone'.*is deleted"):
        publish_run(uri, publication("gone"))


def test_what_mlflow_refuses_is_said(uri: str) -> None:
    wanted = publication("refused")
    with pytest.raises(KDError, match=r"refused: .*model name"):
        publish_run(uri, replace(wanted, model=replace(wanted.model, name="a/b")))


def test_a_dead_server_is_an_error_within_seconds(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(KDError, match=r"kd up.*--set run\.tracking=") as caught:
        publish_run(f"http://user:canary@{address}", publication("dead"))
    assert time.monotonic() - start < 60, "left alone, mlflow would try for minutes"
    assert f"MLflow at http://{address} cannot be used" in str(caught.value)
    assert "canary" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_silent_server_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)  # accepts, and never replies
        start = time.monotonic()
        with pytest.raises(KDError, match="kd up"):
            publish_run(f"http://127.0.0.1:{silent.getsockname()[1]}", publication("silent"))
        assert time.monotonic() - start < 60, "left alone, mlflow would try for minutes"


@pytest.mark.parametrize("tracking", ["sqlite:////proc/nowhere/mlflow.db", "nonsense://x", "./mlruns"])
def test_a_tracking_uri_that_cannot_be_is_an_error_at_once(tracking: str) -> None:
    start = time.monotonic()
    with pytest.raises(KDError, match=r"--set run\.tracking="):
        publish_run(tracking, publication("nowhere"))
    assert time.monotonic() - start < 60


def test_default_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri(None) == f"sqlite:///{tmp_path}/.kd/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_tracking_uri(None) == "http://tracking:5000"
    assert default_tracking_uri("http://mine") == "http://mine"


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, tasks.tracking; sys.exit('mlflow' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_fresh_process_in_an_empty_directory_is_silent_and_leaves_only_its_own(tmp_path: Path) -> None:
    code = (
        "import pickle, sys, threading; from tasks.tracking import *; "
        "publish_run(default_tracking_uri(None), pickle.load(sys.stdin.buffer)); sys.exit(threading.active_count() - 1)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTEST"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    wanted = pickle.dumps(publication("fresh"))
    done = subprocess.run([sys.executable, "-c", code], input=wanted, cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [p.name for p in tmp_path.iterdir()] == [".kd"]
    assert {p.name for p in (tmp_path / ".kd").iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlruns"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` process on a free port."""
    import httpx

    directory = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", str(directory / "artifacts")]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail(f"mlflow server did not start: {(directory / 'log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.parametrize("source", ["s3://bucket/kd/artifacts/student/0a/f0", "/srv/a b+c#d%41/artifacts/f0"])
def test_through_a_real_server(server: str, source: str, capfd: pytest.CaptureFixture[str]) -> None:
    name = "remote-s3" if source.startswith("s3") else "remote-local"
    wanted = publication(name, source=source)
    published = publish_run(server, wanted)
    before = state(server, name)
    assert publish_run(server, wanted) == published
    assert state(server, name) == before
    assert capfd.readouterr() == ("", "")
    assert (published.version, published.champion_version) == (1, 1)
    experiment = client_of(server).get_experiment_by_name(name)
    assert published.run_url == f"{server}/#/experiments/{experiment.experiment_id}/runs/{published.run_id}"
    assert before["runs"][wanted.run_key][6] == {"report.html": 9, "report.json": 2}
    ((_, stored, tags, _, _),) = before["versions"]
    assert tags["kd.source"] == source
    assert stored == (source if source.startswith("s3") else "kd-file:///srv/a%20b%2Bc%23d%2541/artifacts/f0")
