"""Temporary folders: gone after use, swept after a kill, kept while another process uses them, named when full."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kd_core.errors import StoreError
from kd_core.store import LocalStore
from kd_core.store import scratch as module
from kd_core.store.scratch import scratch

HOLD = "from kd_core.store.scratch import scratch\nwith scratch() as p:\n (p/'big').write_bytes(b'x'); print(p, flush=True); input()"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(module, "_swept", set())
    return tmp_path


def _holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_gone_after_its_block(folder: Path) -> None:
    with scratch() as path:
        (path / "sub").mkdir()
        assert path.parent == folder
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_uses_is_not(folder: Path) -> None:
    killed, left = _holder()
    killed.kill()
    killed.communicate()
    assert (left / "big").is_file()
    living, used = _holder()
    try:
        assert not left.exists(), "the next process sweeps"
        with scratch() as mine:
            assert set(folder.iterdir()) == {used, mine}
    finally:
        living.communicate("\n", timeout=20)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")],
)
def test_a_full_folder_is_named_with_its_bytes(error: Exception) -> None:
    def fill() -> None:
        with scratch() as path:
            (path / "x").write_bytes(b"x" * 1000)
            raise error

    with pytest.raises(StoreError, match=r"kd-scratch-\S+: no space left: it holds 1,000 bytes, and [\d,]+ bytes are free there; .*TMPDIR"):
        fill()


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with (
        pytest.raises(StoreError, match=rf"{folder}: cannot make a temporary folder \(No space left on device\), and [\d,]+ bytes"),
        scratch(),
    ):
        pass


def test_other_errors_are_not_about_space() -> None:
    with pytest.raises(ValueError, match="wrong"), scratch():
        raise ValueError("wrong")


def test_the_folder_of_all_state_is_for_its_user_alone(folder: Path) -> None:
    LocalStore(folder / ".kd" / "store").create("a/b", b"x")
    assert stat.S_IMODE((folder / ".kd").stat().st_mode) == 0o700
