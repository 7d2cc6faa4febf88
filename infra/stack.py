"""The local stack: an S3 server (SeaweedFS), an MLflow server, a Prefect server and a Prefect worker.

    up(home)            start all, wait until they answer        down(home)      stop all, leave no process
    status(home)        what runs                                deploy(info, file)  register the flows of a prefect.yaml
    object_store(home)  the S3 server alone, for a `with` block (tests)

All state (data, databases, logs, generated credentials) is below ``home``; ports move when they are taken. The worker
inherits the credentials, the addresses and the current directory, so flows find the stack without configuration.
Meant for one machine: everything listens on 127.0.0.1 only.
"""

import fcntl
import json
import os
import random
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from infra.processes import ServerProcess, binary, family, find_ports, is_alive, marked, spawn, stop, tail
from kd_core.errors import KDError
from kd_core.store.local import make_directory

__all__ = ["BUCKET", "SERVERS", "WORK_POOL", "StackInfo", "deploy", "down", "object_store", "status", "up"]

BUCKET = "distillery"
WORK_POOL = "kd"
SERVERS = ("s3", "mlflow", "prefect", "worker")

_START_SECONDS = 180.0
_GRACE_SECONDS = 15.0
_GRPC_OFFSET = 10_000  # SeaweedFS: the gRPC port of each of its parts
_WEED_PORTS = {"s3": 8333, "filer": 8888, "master": 9333, "volume": 9340}
_WEED_SECRET = "weed"
_PORTS = _WEED_PORTS | {"mlflow": 5000, "prefect": 4200}


@dataclass(frozen=True)
class StackInfo:
    """A running stack.

    Attributes:
        home: folder with all its state; logs are in ``home/logs``.
        urls: server name -> address for a browser or a client.
        ports: port name -> number.
        pids: server name -> pid, of the servers that run.
        env: environment variables with which a client finds the stack; holds the S3 secret, so it is not in the repr.
        bucket: name of the bucket in the S3 server.
    """

    home: Path
    urls: Mapping[str, str]
    ports: Mapping[str, int]
    pids: Mapping[str, int]
    env: Mapping[str, str] = field(repr=False)
    bucket: str = BUCKET

    @property
    def env_file(self) -> Path:
        """``env`` as NAME=value lines that a shell can source; readable by this user only, as it holds the S3 secret."""
        return self.home / "env"

    @property
    def missing(self) -> tuple[str, ...]:
        """Servers of a whole stack that do not run."""
        return tuple(name for name in SERVERS if name not in self.pids)


# ---------------------------------------------------------------------------------------------- state below home


@dataclass(frozen=True)
class _State:
    ports: dict[str, int]
    processes: dict[str, ServerProcess]


def _load(home: Path) -> _State:
    path = home / "stack.json"
    if not path.exists():
        return _State({}, {})
    raw = json.loads(path.read_text())
    return _State(raw["ports"], {name: ServerProcess(**process) for name, process in raw["processes"].items()})


def _save(home: Path, state: _State) -> None:
    temporary = home / "stack.json.new"
    temporary.write_text(json.dumps(asdict(state), indent=1))
    temporary.replace(home / "stack.json")


def _credentials(home: Path) -> dict[str, str]:
    """The generated secrets of S3, Prefect and SeaweedFS's own parts, made at first use in a file that only this user can read."""
    path = home / "credentials.json"
    if not path.exists():
        made = {
            "AWS_ACCESS_KEY_ID": "kd-" + secrets.token_hex(8),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(24),
            "PREFECT_API_AUTH_STRING": "kd:" + secrets.token_hex(24),
            _WEED_SECRET: secrets.token_hex(24),
        }
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(made, file)
    loaded: dict[str, str] = json.loads(path.read_text())
    return loaded


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time; a second one waits."""
    make_directory(home.parent)
    home.mkdir(exist_ok=True, mode=0o700)
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _info(home: Path, state: _State) -> StackInfo:
    urls = {name: f"http://127.0.0.1:{state.ports[name]}" for name in SERVERS if name in state.ports}
    secret = _credentials(home)
    env = {name: value for name, value in secret.items() if name.startswith("AWS_")}
    env |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL_S3": urls["s3"]}
    if "mlflow" in urls:
        env |= {"MLFLOW_TRACKING_URI": urls["mlflow"], "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    if "prefect" in urls:
        env |= {"PREFECT_API_URL": f"{urls['prefect']}/api", "PREFECT_HOME": str(home / "prefect")}
        env |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_API_AUTH_STRING": secret["PREFECT_API_AUTH_STRING"]}
    pids = {name: process.pid for name, process in state.processes.items() if is_alive(process)}
    return StackInfo(home, urls, state.ports, pids, env)


# ---------------------------------------------------------------------------------------------- the servers


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would point a server elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "PREFECT_"))}
    return {**kept, **extra}


def _command(name: str, home: Path, ports: Mapping[str, int]) -> list[str]:
    if name == "s3":
        flags: dict[str, int | str] = {"s3": "true", "filer": "true", "filer.exposeDirectoryData": "false"}
        flags |= {"s3.port.iceberg": 0, "s3.port.lance": 0}
        flags |= {"volume.max": 0, "master.volumeSizeLimitMB": 1024, "volume.preStopSeconds": 0}
        flags |= {f"{part}.port": ports[part] for part in _WEED_PORTS}
        flags |= {f"{part}.port.grpc": ports[part] + _GRPC_OFFSET for part in _WEED_PORTS}
        off = ("webdav", "master.telemetry", "s3.autoCreateBucket")
        return [
            binary("weed"),
            "-logtostderr=true",
            "server",
            f"-dir={home / 's3'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{flag}={value}" for flag, value in flags.items()),
            *(f"-{flag}=false" for flag in off),
        ]
    if name == "mlflow":
        database, artifacts = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}", str(home / "mlflow" / "artifacts")
        address = ["--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1"]
        return [binary("mlflow"), "server", "--backend-store-uri", database, "--artifacts-destination", artifacts, *address]
    if name == "prefect":
        return [binary("prefect"), "--no-prompt", "server", "start", "--host", "127.0.0.1", "--port", str(ports["prefect"])]
    return [binary("prefect"), "--no-prompt", "worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", "local"]


def _server_env(name: str, info: StackInfo) -> dict[str, str]:
    secret = _credentials(info.home)
    prefect = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{info.home / 'prefect' / 'prefect.db'}",
        "PREFECT_SERVER_API_AUTH_STRING": secret["PREFECT_API_AUTH_STRING"],
        # the default is every origin: a page of any site could start runs
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": info.urls.get("prefect", ""),
    }
    extra = {
        # the filer, the master and the volumes have ports of their own: with these keys they ask for a token, as S3 does for credentials
        "s3": {f"WEED_JWT_{part}_KEY": secret[_WEED_SECRET] for part in ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")},
        "mlflow": {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        "prefect": prefect,
        "worker": {},
    }
    return _environment({**info.env, **extra[name]})


def _start(home: Path, state: _State, name: str) -> None:
    """Spawn one server and note it before anything else can fail."""
    (home / "logs").mkdir(exist_ok=True)
    if name != "worker":
        (home / name).mkdir(exist_ok=True)
    command, env = _command(name, home, state.ports), _server_env(name, _info(home, state))
    state.processes[name] = spawn(command, env=env, log=_log(home, name), home=home)
    _save(home, state)


def _log(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _worker_polls(info: StackInfo) -> bool:
    api, auth = info.env["PREFECT_API_URL"], httpx.BasicAuth(*info.env["PREFECT_API_AUTH_STRING"].split(":"))
    try:
        reply = httpx.post(f"{api}/work_pools/{WORK_POOL}/workers/filter", json={}, auth=auth, timeout=2.0, trust_env=False)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200 and any(worker["status"] == "ONLINE" for worker in reply.json())


def _is_ready(name: str, info: StackInfo) -> bool:
    if name == "worker":
        return _worker_polls(info)
    path = {"s3": "/healthz", "mlflow": "/health", "prefect": "/api/health"}[name]
    return _answers(info.urls[name] + path)


def _wait(home: Path, state: _State, name: str) -> None:
    """Wait until a server answers.

    Raises:
        KDError: it does not answer in time, or any server ended; the message ends with the last log lines.
    """
    info, deadline = _info(home, state), time.monotonic() + _START_SECONDS
    while not _is_ready(name, info):
        ended = next((each for each, process in state.processes.items() if not is_alive(process)), None)
        if ended is not None:
            raise KDError(f"server {ended!r} ended while it started; its log {_log(home, ended)} ends with:\n{tail(_log(home, ended))}")
        if time.monotonic() > deadline:
            log = _log(home, name)
            raise KDError(f"server {name!r} did not answer within {_START_SECONDS:.0f} s; its log {log} ends with:\n{tail(log)}")
        time.sleep(0.2)


def _make_bucket(info: StackInfo) -> None:
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import ClientError

    client = Session(info.env["AWS_ACCESS_KEY_ID"], info.env["AWS_SECRET_ACCESS_KEY"]).client(
        "s3", endpoint_url=info.urls["s3"], region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
    )
    try:
        client.create_bucket(Bucket=info.bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
            raise KDError(f"cannot make bucket {info.bucket!r} at {info.urls['s3']}: {error}; see {_log(info.home, 's3')}") from error
    finally:
        client.close()


# ---------------------------------------------------------------------------------------------- up, down, status


def up(home: Path, *, say: Callable[[str], None]) -> StackInfo:
    """Start the whole stack and wait until every server answers; when it runs already, only say where it is.

    Args:
        home: folder for all state, made if needed.
        say: takes one line of progress.

    Raises:
        KDError: a server is not installed, or does not come up. What was started is stopped again.
    """
    home = home.absolute()
    with _lock(home):
        running = status(home)
        if running is not None and not running.missing:
            _say_urls(running, say)
            return running
        if running is not None and running.pids:
            say(f"not running: {', '.join(running.missing)}; starting all again")
        _stop_all(home)
        state = _State(find_ports(_PORTS | _load(home).ports, second_offset=dict.fromkeys(_WEED_PORTS, _GRPC_OFFSET)), {})
        try:
            say("starting the object store, MLflow, Prefect and a worker (the first time takes up to a minute)")
            for name in ("s3", "mlflow", "prefect"):
                _start(home, state, name)
            _wait(home, state, "s3")
            _make_bucket(_info(home, state))
            _wait(home, state, "prefect")
            _start(home, state, "worker")
            _wait(home, state, "worker")
            _wait(home, state, "mlflow")
        except BaseException:
            _stop_all(home)
            raise
        info = _info(home, state)
        _write_env(info)
        _say_urls(info, say)
        return info


def _write_env(info: StackInfo) -> None:
    _write_private(info.env_file, "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(info.env.items())))


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _say_urls(info: StackInfo, say: Callable[[str], None]) -> None:
    say(f"Prefect       {info.urls['prefect']}")
    say(f"MLflow        {info.urls['mlflow']}")
    say(f"object store  {info.urls['s3']}  (s3://{info.bucket})")


def down(home: Path) -> list[str]:
    """Stop every process of the stack, flow runs included, and leave none. Data, logs and ports are kept.

    Returns:
        What was stopped, one line a process.
    """
    home = home.absolute()
    if not home.is_dir():
        return []
    with _lock(home):
        return _stop_all(home)


def _stop_all(home: Path) -> list[str]:
    """The worker and its flow runs first, while the servers can still hear how they ended; then all the rest."""
    state = _load(home)
    names = {process.pid: name for name, process in state.processes.items()}
    running = marked(home)
    stopped = sorted(f"{names.get(process.pid, 'child process')} (pid {process.pid})" for process in running)
    if "worker" in state.processes:
        stop(family(state.processes["worker"]), grace_seconds=_GRACE_SECONDS)
    while running := marked(home):
        stop(running, grace_seconds=_GRACE_SECONDS)
    if state.processes:
        Path(f"/tmp/seaweedfs-s3-{state.ports['s3']}.sock").unlink(missing_ok=True)  # the one socket that weed leaves behind
        _save(home, _State(state.ports, {}))
    return stopped


def status(home: Path) -> StackInfo | None:
    """The stack as it runs now; ``missing`` names what does not. None if no server of it runs."""
    home = home.absolute()
    state = _load(home)
    if not any(is_alive(process) for process in state.processes.values()):
        return None
    return _info(home, state)


def deploy(info: StackInfo, file: Path) -> None:
    """Register every deployment of a prefect.yaml with the Prefect server.

    Raises:
        KDError: the deployment failed; the message ends with what the command said.
    """
    log = _log(info.home, "deploy")
    command = [binary("prefect"), "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=_environment(info.env), stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=_START_SECONDS
        )
    if done.returncode != 0:
        raise KDError(f"`{shlex.join(command[1:])}` failed with code {done.returncode}; its log {log} ends with:\n{tail(log)}")


@contextmanager
def object_store(home: Path) -> Iterator[StackInfo]:
    """The S3 server alone, with its bucket made, for the length of a `with` block. Ports are drawn, so many can run at once.

    Raises:
        KDError: it is not installed, or does not come up.
    """
    home = home.absolute()
    with _lock(home):
        if status(home) is not None:
            raise KDError(f"a stack is running in {home}; use another folder, or stop it first")
        first = random.SystemRandom().randrange(11_000, 22_000)  # below the range from which clients' own ports are drawn, +10,000 too
        wanted = {name: first + 7 * i for i, name in enumerate(_WEED_PORTS)}
        state = _State(find_ports(wanted, second_offset=dict.fromkeys(_WEED_PORTS, _GRPC_OFFSET)), {})
        try:
            _start(home, state, "s3")
            _wait(home, state, "s3")
            _make_bucket(_info(home, state))
        except BaseException:
            _stop_all(home)
            raise
    try:
        yield _info(home, state)
    finally:
        down(home)
