"""Small caches of real soft labels, made the way capture makes them, from a generator instead of a teacher."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from kd_core.recipe import Sampled, SoftLabels
from kd_core.rows.keys import soft_label_key
from kd_core.rows.table import Commit, RowCache
from kd_core.softlabels import Targets, make_targets
from kd_core.softlabels.codec import encode_rows
from kd_core.store import LocalStore, Store

NAMESPACE = "a" * 32
COLUMNS = 24
SAMPLED = Sampled(kind="sampled", num_draws=25, temperature=2.0)
TEACHER = {
    "weights": {"hub": "org/teacher", "revision": "0123456789abcdef", "dtype": "float32"},
    "dtype": "float32",
    "engine": "transformers",
}


def targets_of(row: int, ids: Sequence[int], first: int, policy: SoftLabels = SAMPLED) -> Targets:
    """What a teacher with logits drawn from seed ``row`` says of these tokens."""
    generator = torch.Generator().manual_seed(row)
    num = len(ids) - first
    logits_NV = 3.0 * torch.randn(num, COLUMNS, generator=generator)
    uniform_N = torch.rand(num, generator=generator, dtype=torch.float64)
    return make_targets(logits_NV, torch.tensor(ids[first:]), policy, uniform_N=uniform_N)


def row_ids(row: int) -> tuple[list[int], int]:
    """Token ids and first supervised index of row number ``row``: three to six supervised tokens."""
    return [(7 * row + 3 * i) % COLUMNS for i in range(5 + row % 4)], 2


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def add_shard() -> Callable[..., Commit]:
    """``add_shard(store, rows, policy=, namespace=, source=)`` commits those row numbers as one shard."""

    def add(
        store: Store,
        rows: Sequence[int],
        *,
        policy: SoftLabels = SAMPLED,
        namespace: str = NAMESPACE,
        source: str | None = None,
    ) -> Commit:
        cache = RowCache(store, "soft_labels", namespace)
        made = [(ids, first, targets_of(row, ids, first, policy)) for row in rows for ids, first in [row_ids(row)]]
        model, blobs = encode_rows([targets for *_, targets in made], [np.array(ids[first:]) for ids, first, _ in made])
        table: list[dict[str, Any]] = [
            {
                "key": soft_label_key(namespace, ids, first),
                "prompt_id": f"p{row}",
                "sample_index": None,
                "source": source or ("gold" if row % 2 else "teacher"),
                "finish_reason": "length" if row % 5 == 0 else "stop",
                "ids": ids,
                "first_supervised": first,
                "num_supervised": len(ids) - first,
                "mean_entropy": float(targets.common.entropy_N.mean()),
                "mean_gold_logprob": float(targets.common.gold_logprob_N.mean()),
                "min_gold_logprob": float(targets.common.gold_logprob_N.min()),
                "targets": blob,
            }
            for row, (ids, first, targets), blob in zip(rows, made, blobs, strict=True)
        ]
        cache.describe({"teacher": TEACHER, "policy": policy.model_dump(mode="json", exclude={"max_refused_rows"})})
        tokens = sum(len(ids) - first for ids, first, _ in made)
        return cache.commit(pa.Table.from_pylist(table, schema=SCHEMA), num_tokens=tokens, metadata={b"kd.codec_model": model})

    return add


SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("sample_index", pa.int32()),
        pa.field("source", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("first_supervised", pa.int32(), nullable=False),
        pa.field("num_supervised", pa.int32(), nullable=False),
        pa.field("mean_entropy", pa.float32(), nullable=False),
        pa.field("mean_gold_logprob", pa.float32(), nullable=False),
        pa.field("min_gold_logprob", pa.float32()),
        pa.field("targets", pa.binary(), nullable=False),
    ]
)
