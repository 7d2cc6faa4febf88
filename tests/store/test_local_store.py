"""What only a directory can get wrong: unfinished files, full disks, names in the way."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_core.errors import StoreError
from kd_core.store import LocalStore


def test_importing_the_store_does_not_import_boto3() -> None:
    code = "import sys, kd_core.store; sys.exit(any(name.split('.')[0] in ('boto3', 'botocore') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unfinished_write_leaves_nothing_that_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(StoreError, match=r"/a/b: cannot write 5 bytes: No space left on device; free some space"):
            store.create("a/b", b"12345")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.create("a/b", b"12345")


def test_the_temporary_file_of_a_killed_writer_is_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom kd_core.store import LocalStore\n"
        "os.link = lambda *_: os._exit(9)\nLocalStore(Path(sys.argv[1])).create('a/b', b'12345')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    assert list(store.list("")) == []
    assert store.info("a/b") is None
    assert store.create("a/b", b"other")


def test_a_name_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a", b"file")
    with pytest.raises(StoreError, match="/a/b: cannot write"):
        store.create("a/b", b"")
    store.create("d/x", b"")
    with pytest.raises(StoreError, match="/d: cannot write"):
        store.create("d", b"")
