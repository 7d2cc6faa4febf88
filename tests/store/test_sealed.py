"""A read that is wrong is repeated: what heals goes on with a warning, what is stored wrong is said so, and doubt is said to be doubt."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_core.artifacts import check_bytes, find, materialize, publish, read_bytes
from kd_core.errors import IntegrityError, StoreError, VersionError
from kd_core.ledger import current
from kd_core.rows.table import RowCache
from kd_core.store import LocalStore
from kd_core.store.sealed import seal, unseal
from kd_core.train.checkpoints import Checkpoints

FP = "f" * 32


class Flipping(LocalStore):
    """A far store whose first reads of an object arrive with a bit flipped, each in another place."""

    def __init__(self, root: Path, wrong_reads: int) -> None:
        super().__init__(root)
        self.left: dict[str, int] = {}
        self.wrong_reads = wrong_reads

    def _spoilt(self, key: str, data: bytes) -> bytes:
        left = self.left.setdefault(key, self.wrong_reads)
        if left == 0 or not data:
            return data
        self.left[key] = left - 1
        at = (len(data) // 2 + left) % len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    def get(self, key: str) -> bytes:
        return self._spoilt(key, super().get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._spoilt(key, super().get_range(key, start, length))

    def download(self, key: str, path: Path) -> None:
        path.write_bytes(self._spoilt(key, super().get(key)))

    def local_path(self, key: str) -> Path | None:
        return None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with one artifact of one file."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "weights").write_bytes(b"\x01\x02" * 500)
    publish(LocalStore(tmp_path / "store"), folder, stage="train", fp=FP, identity={}, upstream={}, summary={})
    return tmp_path / "store"


READS: dict[str, Callable[[LocalStore, Path], object]] = {
    "read_bytes": lambda store, folder: read_bytes(store, find(LocalStore(Path(store.uri)), "train", FP), "weights"),
    "materialize": lambda store, folder: materialize(store, find(LocalStore(Path(store.uri)), "train", FP), folder),
    "check_bytes": lambda store, folder: check_bytes(store, find(LocalStore(Path(store.uri)), "train", FP)),
    "find": lambda store, folder: find(store, "train", FP),
}


@pytest.mark.parametrize("read", READS)
def test_one_flipped_bit_on_the_way_heals_and_is_told(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, read: str) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    READS[read](Flipping(root, 1), tmp_path / "cache")
    [line] = [record.getMessage() for record in caplog.records]
    assert "a first read was wrong" in line
    assert "a second one is right" in line
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("read", READS)
def test_two_reads_that_differ_say_nothing_about_what_is_stored(root: Path, tmp_path: Path, read: str) -> None:
    with pytest.raises(StoreError, match=r"two reads gave different bytes, both wrong .* leave it, and run again") as error:
        READS[read](Flipping(root, 2), tmp_path / "cache")
    assert not isinstance(error.value, IntegrityError)
    assert "repair" not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"schema": 1, "record": ' + b"9" * 6000 + b"}", b"", b"\xff\xfe", b"null", b'{"record": 1e999}'],
    ids=["lists", "objects", "digits", "empty", "bytes", "null", "infinite"],
)
def test_json_that_no_program_should_read_is_one_line_with_its_name(tmp_path: Path, body: bytes) -> None:
    """In every kind of object that is JSON."""
    store = LocalStore(tmp_path)
    cache, checkpoints = RowCache(store, "answers", "a" * 32), Checkpoints(store, FP)
    reads = {
        f"artifacts/train/{FP}/record.json": lambda: find(store, "train", FP),
        "ledger/calc/000001.json": lambda: current(store, "calc"),
        f"{cache.prefix}/commits/{'0' * 64}.json": lambda: cache.read_commit("0" * 64),
        checkpoints.record_key(7): lambda: checkpoints.check(7),
    }
    for key, read in reads.items():
        store.create(key, body)
        with pytest.raises(IntegrityError) as error:
            read()
        assert str(error.value).startswith(f"{store.uri}/{key}: not a valid ")
        assert len(str(error.value)) < 1000
        assert "\n" not in str(error.value)


def test_a_sealed_object_is_what_was_sealed_and_nothing_else() -> None:
    data = seal("record", {"b": (1, 2.5), "a": None})
    assert unseal("record", data) == {"a": None, "b": [1, 2.5]}
    with pytest.raises(VersionError, match="a record of version 7; this code reads version 1"):
        unseal("record", json.dumps(json.loads(data) | {"version": 7}).encode())
    with pytest.raises(KeyError):
        unseal("entry", data)
    changed = json.loads(data) | {"record": {"a": None, "b": [1, 2.25]}}
    with pytest.raises(ValueError, match="checksum"):
        unseal("record", json.dumps(changed).encode())
