"""Version 2 of the binary form of soft labels, which caches still hold: it goes on being read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_core.errors import SoftLabelError
from kd_core.softlabels import Targets, decode_rows, parse_model
from kd_core.softlabels.codec import decode_mixed_rows, encode_rows
from kd_core.softlabels.targets import split

KEPT = np.load(Path(__file__).parent / "version_2.npz")
"""Shards as the last code that wrote version 2 wrote and read them: wide has 2^20 columns, peaked has residuals that escape."""

CASES = sorted({name.split("/")[0] for name in KEPT.files})


def shard(case: str) -> tuple[bytes, list[bytes], list[np.ndarray]]:
    """Model, blobs, labels."""
    whole = KEPT[f"{case}/blobs"].tobytes()
    ends = np.cumsum(KEPT[f"{case}/blob_sizes"]).tolist()
    blobs = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert all(blob[0] == 2 for blob in blobs)
    return KEPT[f"{case}/model"].tobytes(), blobs, np.split(KEPT[f"{case}/labels"], np.cumsum(KEPT[f"{case}/lengths"])[:-1])


def assert_as_kept(case: str, found: Targets) -> None:
    fields = [name.rpartition("/")[2] for name in KEPT.files if name.startswith(f"{case}/found/")]
    assert len(fields) > 2
    for field in fields:
        tensor = getattr(found.common if hasattr(found.common, field) else found, field)
        assert torch.equal(tensor, torch.from_numpy(KEPT[f"{case}/found/{field}"])), field


@pytest.mark.parametrize("case", CASES)
def test_version_2_is_read_to_the_bit(case: str) -> None:
    model, blobs, labels = shard(case)
    assert_as_kept(case, decode_rows(parse_model(model), blobs, labels))


@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
def test_rows_of_versions_2_and_3_stand_in_one_batch(case: str) -> None:
    model, blobs, labels = shard(case)
    rows = split(decode_rows(parse_model(model), blobs, labels), [len(gold) for gold in labels])
    again, new = encode_rows(rows, labels, model)
    assert all(blob[0] == 3 for blob in new)
    mixed = [old if i % 2 else blob for i, (old, blob) in enumerate(zip(blobs, new, strict=True))]
    found = decode_mixed_rows([parse_model(again), parse_model(model)], np.arange(len(mixed)) % 2, mixed, labels)
    assert_as_kept(case, found)


def test_damage_to_version_2_is_an_error() -> None:
    model, blobs, labels = shard("sampled")
    for at in range(0, len(blobs[0]), 7):
        damaged = bytearray(blobs[0])
        damaged[at] ^= 0x10
        with pytest.raises(SoftLabelError, match="row 0"):
            decode_rows(parse_model(model), [bytes(damaged)], labels[:1])


def test_a_version_that_changes_is_damage() -> None:
    model, blobs, labels = shard("sampled")
    rows = split(decode_rows(parse_model(model), blobs, labels), [len(gold) for gold in labels])
    again, new = encode_rows(rows, labels, model)
    for parsed, blob in ((parse_model(model), b"\x03" + blobs[0][1:]), (parse_model(again), b"\x02" + new[0][1:])):
        with pytest.raises(SoftLabelError, match="checksum"):
            decode_rows(parsed, [blob], labels[:1])
