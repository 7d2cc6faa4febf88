"""The stack's processes: only ours are stopped, and all of them are."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from infra.processes import ServerProcess, family, find_ports, is_alive, marked, spawn, stop, tail
from infra.stack import deploy, down, object_store, status, up
from kd_core.errors import KDError
from kd_core.recipe import S3Options
from kd_core.store import S3Store

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def foreign() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_a_pid_that_went_to_another_process_is_not_ours(foreign: subprocess.Popen[bytes], tmp_path: Path) -> None:
    started = psutil.Process(foreign.pid).create_time()
    reused = ServerProcess(foreign.pid, started - 60.0)
    assert not is_alive(reused)
    assert family(reused) == []
    assert is_alive(ServerProcess(foreign.pid, started))
    state = {"ports": {"s3": 1}, "processes": {"s3": {"pid": foreign.pid, "started_seconds": started - 60.0}}}
    (tmp_path / "stack.json").write_text(json.dumps(state))
    assert status(tmp_path) is None
    assert down(tmp_path) == []
    assert foreign.poll() is None


def test_stop_reaches_orphans_and_those_that_ignore_sigterm(foreign: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"
    log = tmp_path / "log"
    leader = spawn([sys.executable, "-W", "ignore", "-c", parent], env=dict(os.environ), log=log, home=tmp_path)
    _until(lambda: not is_alive(leader) and tail(log) == "ready", 20)
    (orphan,) = marked(tmp_path)
    assert orphan.pid not in (leader.pid, foreign.pid)
    stop(marked(tmp_path), grace_seconds=0.3)
    assert marked(tmp_path) == []
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert foreign.poll() is None


def test_down_without_a_stack_stops_nothing(tmp_path: Path) -> None:
    assert down(tmp_path / "never") == []
    assert not (tmp_path / "never").exists()
    assert status(tmp_path / "never") is None


def test_a_busy_port_is_passed_over() -> None:
    first = find_ports({"a": 23_000, "b": 23_000}, second_offset={"a": 1})
    assert len({first["a"], first["a"] + 1, first["b"]}) == 3
    with socket.create_server(("127.0.0.1", first["a"] + 1)):
        moved = find_ports({"a": first["a"]}, second_offset={"a": 1})
    assert moved["a"] > first["a"] + 1


def _asks_for_credentials(address: str, *paths: str) -> None:
    """Nothing is read, listed, written or deleted by who has none."""
    for path in ("/", *paths, "".join(paths)):
        for method in ("GET", "PUT", "POST", "DELETE"):
            reply = httpx.request(method, address + path, headers={"Accept": "application/json"}, content=b"x" if method != "GET" else None)
            assert reply.status_code in (400, 401, 403, 405), (method, address + path, reply.status_code)


@pytest.mark.drill
@pytest.mark.stack
def test_an_object_store_keeps_its_data_when_its_ports_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("write", "read"):
        with object_store(tmp_path) as info:
            for name, value in info.env.items():
                monkeypatch.setenv(name, value)
            store = S3Store(info.bucket, "", options=S3Options())
            if step == "write":
                assert store.create("kept", b"bytes")
            assert not store.create("kept", b"other")
            assert store.get("kept") == b"bytes"
            store.close()
            for name in ("s3", "filer", "volume"):
                _asks_for_credentials(f"http://127.0.0.1:{info.ports[name]}", f"/buckets/{info.bucket}", "/kept")
            with pytest.raises(KDError, match="a stack is running in"), object_store(tmp_path):
                pass
        assert marked(tmp_path) == []
    assert (tmp_path / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert info.env["AWS_SECRET_ACCESS_KEY"] not in repr(info) + (tmp_path / "logs" / "s3.log").read_text()


PROBE = """
import json, os, time
from pathlib import Path
from prefect import flow

@flow
def probe() -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")
    seen = {"pid": os.getpid(), "env": {name: os.environ.get(name) for name in names}}
    Path("probe.new").write_text(json.dumps(seen))
    Path("probe.new").rename("probe.json")
    time.sleep(600)
"""
PREFECT_YAML = """
deployments:
  - name: probe
    entrypoint: probe.py:probe
    work_pool: {name: kd}
pull:
  - prefect.deployments.steps.set_working_directory: {directory: %s}
"""


@pytest.mark.drill
@pytest.mark.stack
@pytest.mark.slow
def test_the_whole_stack_comes_up_once_runs_a_flow_and_goes_down_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, project, lines = tmp_path / "stack", tmp_path / "project", []
    project.mkdir()
    monkeypatch.chdir(project)
    busy = [port for port in (4200, 5000, 8333) if find_ports({"port": port}, second_offset={})["port"] != port]
    try:
        info = up(home, say=lines.append)
        assert info.missing == ()
        assert not set(busy) & set(info.ports.values())
        assert up(home, say=lines.append) == info
        assert lines[-3:] == lines[-6:-3] == [f"Prefect       {info.urls['prefect']}", f"MLflow        {info.urls['mlflow']}", lines[-1]]
        assert status(home) == info
        assert httpx.get(f"{info.urls['mlflow']}/api/2.0/mlflow/registered-models/search").json() == {}

        (project / "probe.py").write_text(textwrap.dedent(PROBE))
        (project / "prefect.yaml").write_text(PREFECT_YAML % project)
        deploy(info, project / "prefect.yaml")
        api, auth = info.env["PREFECT_API_URL"], httpx.BasicAuth(*info.env["PREFECT_API_AUTH_STRING"].split(":"))
        assert httpx.get(f"{api}/deployments/name/probe/probe").status_code == 401
        deployment = httpx.get(f"{api}/deployments/name/probe/probe", auth=auth).json()["id"]
        start = f"{api}/deployments/{deployment}/create_flow_run"
        for origin, allowed in (("http://evil.example", None), (info.urls["prefect"], info.urls["prefect"])):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            assert httpx.options(start, headers=asked).headers.get("access-control-allow-origin") == allowed
        assert httpx.post(start, json={}, headers={"Origin": "http://evil.example"}).status_code == 401
        assert (home / "env").stat().st_mode & 0o777 == 0o600
        assert info.env["PREFECT_API_AUTH_STRING"] in (home / "env").read_text()
        assert httpx.post(start, json={}, auth=auth).status_code == 201
        _until(lambda: (project / "probe.json").exists(), 90)
        seen = json.loads((project / "probe.json").read_text())
        assert seen["env"] == {name: info.env[name] for name in seen["env"]}
        assert psutil.pid_exists(seen["pid"])

        psutil.Process(info.pids["mlflow"]).kill()  # its own child lives on
        _until(lambda: status(home).missing == ("mlflow",), 10)
        stopped = down(home)
        assert {line.split(" (")[0] for line in stopped} == {"s3", "prefect", "worker", "child process"}
        assert not psutil.pid_exists(seen["pid"])
        assert marked(home) == []
        assert status(home) is None
        assert down(home) == []

        (home / "mlflow" / "mlflow.db").write_bytes(b"not a database" * 1000)
        with pytest.raises(
            KDError, match=r"(?s)server 'mlflow' ended while it started; its log .*mlflow.log ends with:\n.*file is not a database"
        ):
            up(home, say=lines.append)
        assert marked(home) == []
    finally:
        down(home)
