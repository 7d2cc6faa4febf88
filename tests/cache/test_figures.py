"""Figures of a row table add up to what is stored."""

import pytest

from kd_core.cache.catalog import find_namespace
from kd_core.cache.figures import figures
from kd_core.errors import IntegrityError
from kd_core.rows.table import RowCache

A = "a" * 32


def test_bytes_rows_and_strays_add_up(store, add_shard) -> None:
    commits = [add_shard(store, range(12)), add_shard(store, range(10, 20))]
    store.create(f"rows/soft_labels/{A}/shards/{'0' * 64}.parquet", b"12345")
    ticks = []
    found = figures(find_namespace(store, None, table=None), tick=ticks.append)
    assert sum(found.bytes_by_part.values()) == sum(commit.size_bytes for commit in commits)
    assert all(size > 0 for size in found.bytes_by_part.values())
    assert {"targets", "ids", "codec_model", "footer"} <= found.bytes_by_part.keys()
    assert (found.rows, found.duplicate_rows, found.orphan_shards, found.orphan_bytes) == (20, 2, 1, 5)
    assert found.tokens == sum(commit.num_tokens for commit in commits)
    assert sum(part.rows for part in found.entropy) == 20
    assert sum(part.tokens for part in found.entropy) == sum(3 + row % 4 for row in range(20))
    cache = RowCache(store, "soft_labels", A)
    entropies = cache.read(cache.snapshot(), sorted(cache.snapshot().keys()))["mean_entropy"].to_pylist()
    for part in found.entropy:
        assert part.rows == sum(part.low <= entropy < part.high for entropy in entropies)
    assert found.finish_reasons == {"stop": 16, "length": 4}
    assert [tick.done for tick in ticks] == [1, 2]


def test_a_damaged_footer_is_named(store, add_shard) -> None:
    commit = add_shard(store, range(3))
    path = store.local_path(RowCache(store, "soft_labels", A).shard_key(commit))
    path.write_bytes(path.read_bytes()[:-8] + bytes([255] * 8))
    with pytest.raises(IntegrityError, match=rf"{commit.sha256}\.parquet: its footer cannot be read"):
        figures(find_namespace(store, None, table=None))
