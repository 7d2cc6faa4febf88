"""The commit protocol: the record last, one winner, every byte verified, every disagreement named."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kd_core.artifacts import Artifact, Record, expect_identity, find, materialize, open_artifact, publish, read_bytes, workspace
from kd_core.errors import ArtifactError, IntegrityError, VersionError
from kd_core.store import LocalStore

FP = "f" * 32


class FarStore(LocalStore):
    """A local store that gives no local paths, as a bucket does."""

    def local_path(self, key: str) -> Path | None:
        return None


def build(store: LocalStore, files: Mapping[str, bytes], *, fp: str = FP, summary: Mapping[str, Any] | None = None) -> Record:
    with workspace() as directory:
        for name, data in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        return publish(store, directory, stage="train", fp=fp, identity={"a": 1}, upstream={"curate": "c" * 32}, summary=summary or {})


FILES = {"metrics.json": b"{}", "model/weights.bin": b"\x00\x01" * 500}


def test_what_is_published_is_found_and_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert find(store, "train", FP) is None
    record = build(store, FILES, summary={"rows": 3})
    found = find(store, "train", FP)
    assert found == record
    assert [file.name for file in found.files] == sorted(FILES)
    assert (found.summary, found.upstream, found.identity) == ({"rows": 3}, {"curate": "c" * 32}, {"a": 1})
    assert {name: read_bytes(store, found, name) for name in FILES} == FILES
    assert open_artifact(store, Artifact("train", FP, record.digest)) == record


def test_the_record_is_written_last(tmp_path: Path) -> None:
    """A write that fails at any object before the record leaves no artifact; the next run completes it."""
    store = LocalStore(tmp_path)

    class Failing(LocalStore):
        left = 0

        def create(self, key: str, data: bytes | Path) -> bool:
            if self.left == 0:
                raise OSError("the network is gone")
            self.left -= 1
            return super().create(key, data)

    failing = Failing(tmp_path)
    for allowed in range(len(FILES) + 1):
        failing.left = allowed
        with pytest.raises(OSError, match="network"):
            build(failing, FILES)
        assert find(store, "train", FP) is None
    assert build(store, FILES) == find(store, "train", FP)


def test_of_two_workers_one_record_wins_and_both_hold_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = build(store, {"x": b"first"})
    second = build(store, {"x": b"second"})
    assert second == first == find(store, "train", FP)
    assert read_bytes(store, second, "x") == b"first"


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    digests = [build(store, files, fp=f"{i:032x}").digest for i, files in enumerate([{"a": b"1"}, {"a": b"1"}, {"b": b"1"}, {"a": b"2"}])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_an_artifact_reference_is_small_and_picklable() -> None:
    artifact = Artifact("train", FP, "d" * 32, 1.5, hit=False)
    assert pickle.loads(pickle.dumps(artifact)) == artifact
    assert len(pickle.dumps(artifact)) < 500


def test_a_reference_to_other_bytes_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = build(store, FILES)
    with pytest.raises(ArtifactError, match=rf"train {FP}: expected bytes 0{{32}}, the store holds {record.digest}"):
        open_artifact(store, Artifact("train", FP, "0" * 32))
    with pytest.raises(ArtifactError, match="is gone; run the recipe again"):
        open_artifact(store, Artifact("train", "0" * 32, record.digest))


@pytest.mark.parametrize("far", [False, True])
def test_files_are_local_and_verified(tmp_path: Path, far: bool) -> None:
    store = FarStore(tmp_path / "store") if far else LocalStore(tmp_path / "store")
    record = build(store, FILES)
    directory = materialize(store, record, tmp_path / "cache")
    assert {name: (directory / name).read_bytes() for name in FILES} == FILES
    assert directory.is_relative_to(tmp_path / "cache") == far
    assert materialize(store, record, tmp_path / "cache") == directory


@pytest.mark.parametrize("far", [False, True])
def test_a_flipped_byte_of_a_file_is_refused_by_name(tmp_path: Path, far: bool) -> None:
    store = FarStore(tmp_path / "store") if far else LocalStore(tmp_path / "store")
    record = build(store, FILES)
    file = tmp_path / "store" / record.prefix / "model" / "weights.bin"
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    for read in (lambda: read_bytes(store, record, "model/weights.bin"), lambda: materialize(store, record, tmp_path / "cache")):
        with pytest.raises(
            IntegrityError, match=rf"{record.prefix}/model/weights\.bin: its sha256 differs from the record, in two reads; kd cache repair"
        ):
            read()


def test_every_damaged_byte_of_a_record_is_refused_by_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    build(store, {"x": b"1"})
    (file,) = tmp_path.rglob("record.json")
    data = file.read_bytes()
    for at in {*range(len(data))} - {data.index(b'"version": 1') + len('"version": ')}:
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(IntegrityError, match=rf"{file}: not a valid record .*in two reads; kd cache repair --store {tmp_path} --yes"):
            find(store, "train", FP)


@pytest.mark.parametrize("body", [b"", b"null", b"[1]", b'{"record": {}}', b"\xff"])
def test_what_is_no_record_is_refused(tmp_path: Path, body: bytes) -> None:
    store = LocalStore(tmp_path)
    store.create(f"artifacts/train/{FP}/record.json", body)
    with pytest.raises(IntegrityError, match=rf"artifacts/train/{FP}/record\.json: not a valid record"):
        find(store, "train", FP)


def test_a_record_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    build(store, {"x": b"1"})
    (file,) = tmp_path.rglob("record.json")
    assert json.loads(file.read_text())["version"] == 1
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 7}))
    with pytest.raises(VersionError, match=rf"{file}: a record of version 7; this code reads version 1; update the package, or"):
        find(store, "train", FP)


def test_another_identity_is_an_error_field_by_field(tmp_path: Path) -> None:
    record = build(LocalStore(tmp_path), FILES)
    expect_identity(record, {"a": 1}, {"curate": "c" * 32})
    message = (
        r"was made from something else: a: stored 1, recipe 2; b: stored None, recipe 'new'; "
        r"upstream\.curate: stored 'c{32}', recipe 'd{32}'"
    )
    with pytest.raises(ArtifactError, match=message):
        expect_identity(record, {"a": 2, "b": "new"}, {"curate": "d" * 32})


def test_a_missing_file_is_named_with_those_there_are(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no file 'y'; it has \['x'\]"):
        read_bytes(store, build(store, {"x": b"1"}), "y")
