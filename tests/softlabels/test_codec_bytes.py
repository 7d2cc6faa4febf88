"""Bytes that are in the world already: whatever becomes of the codec, it reads them to the same bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_core.softlabels import decode_rows, encode_rows, parse_model
from kd_core.softlabels.targets import split

KEPT = np.load(Path(__file__).parent / "version_1.npz")
"""Shards of version 1 and what they were read as: wide has 2^20 columns, peaked has residuals that escape."""

CASES = sorted({name.split("/")[0] for name in KEPT.files})


def shard(case: str) -> tuple[bytes, list[bytes], list[np.ndarray]]:
    """Model, blobs, labels."""
    whole, ends = KEPT[f"{case}/blobs"].tobytes(), np.cumsum(KEPT[f"{case}/blob_sizes"]).tolist()
    blobs = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return KEPT[f"{case}/model"].tobytes(), blobs, np.split(KEPT[f"{case}/labels"], np.cumsum(KEPT[f"{case}/lengths"])[:-1])


def test_there_are_shards_of_every_policy() -> None:
    assert CASES == ["all", "dense", "peaked", "sampled", "topk", "two", "wide"]


@pytest.mark.parametrize("case", CASES)
def test_stored_bytes_are_read_to_the_bit(case: str) -> None:
    model, blobs, labels = shard(case)
    found = decode_rows(parse_model(model), blobs, labels)
    fields = [name.rpartition("/")[2] for name in KEPT.files if name.startswith(f"{case}/found/")]
    assert len(fields) > 2
    for field in fields:
        tensor = getattr(found.common if hasattr(found.common, field) else found, field)
        assert torch.equal(tensor, torch.from_numpy(KEPT[f"{case}/found/{field}"])), field


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_as_the_same_bytes(case: str) -> None:
    model, blobs, labels = shard(case)
    rows = split(decode_rows(parse_model(model), blobs, labels), [len(gold) for gold in labels])
    assert encode_rows(rows, labels, model) == (model, blobs)
