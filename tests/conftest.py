"""Every test starts from the same environment: no addresses, no credentials, no network; real servers once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.stack import StackInfo, object_store

_FOREIGN = ("AWS_", "HF_", "KD_", "MLFLOW_", "PREFECT_")
_CLEAN = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def pytest_configure() -> None:
    """Libraries that read the environment when they are imported must find the clean one."""
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ.update(_CLEAN)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one test sets is seen by the next."""
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        monkeypatch.delenv(name)
    for name, value in _CLEAN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackInfo]:
    """A real S3 server on drawn ports, with one bucket; for tests marked `stack`."""
    home: Path = tmp_path_factory.mktemp("seaweed")
    with object_store(home) as info:
        yield info


@pytest.fixture
def s3_environment(seaweed: StackInfo, monkeypatch: pytest.MonkeyPatch) -> StackInfo:
    """The session's S3 server, with its address and credentials in this test's environment."""
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    return seaweed
