"""From the cache to training tensors on a loopback S3 server: sequences a second, beside one object a sample and litdata.

Every side starts cold (no local copies), reads every sample once in an order shuffled for training, and ends in int64
ids, counts and lengths and float32 statistics of batches of 32. Wall time, as the server is another process; the server
shares this machine's cores with all sides alike.
"""

import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.measure import Check, Figure, figure, in_turn, times_better, timings
from benchmarks.peers import raw_arrays
from benchmarks.peers.raw_arrays import Bucket, from_arrays, to_arrays
from benchmarks.workloads import sampled_rows, token_rows
from infra.stack import object_store
from kd_core.errors import KDError
from kd_core.recipe import S3Options
from kd_core.rows.keys import soft_label_key
from kd_core.rows.range_cache import RangeCache
from kd_core.rows.schemas import CODEC_MODEL, SOFT_LABEL_SCHEMA
from kd_core.rows.table import RowCache
from kd_core.softlabels.codec import encode_rows
from kd_core.softlabels.targets import SampledTargets, Targets
from kd_core.store import S3Store, Store
from kd_core.tokens.batches import TokenRow
from kd_core.train.batches import EXPECTED_ROWS, PREFETCH_STEPS
from kd_core.train.row_order import step_rows
from kd_core.train.stored_rows import ShardGroups, StoredRows

__all__ = ["open_rows", "run", "soft_label_table", "training_batches"]

_COLUMNS = 49_152
_BATCH = 32
_CACHE_BYTES = 1 << 30


def soft_label_table(
    keyed: list[tuple[str, TokenRow]], targets: Sequence[Targets], known: bytes = b""
) -> tuple[pa.Table, dict[bytes, bytes]]:
    """A shard's rows as capture writes them after a shard with the model ``known``, and the footer's metadata."""
    labels = [np.array(row.ids[row.first_supervised :], np.int64) for _, row in keyed]
    model, blobs = encode_rows(targets, labels, known)
    rows = [
        {
            "key": key,
            "prompt_id": key,
            "sample_index": 0,
            "source": "benchmark",
            "finish_reason": "stop",
            "ids": row.ids,
            "first_supervised": row.first_supervised,
            "num_supervised": row.num_supervised,
            "mean_entropy": float(found.common.entropy_N.mean()),
            "mean_gold_logprob": float(found.common.gold_logprob_N.mean()),
            "min_gold_logprob": float(found.common.gold_logprob_N.min()),
            "targets": blob,
        }
        for (key, row), found, blob in zip(keyed, targets, blobs, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=SOFT_LABEL_SCHEMA), {CODEC_MODEL: model}


def open_rows(store: Store, namespace: str, keyed: list[tuple[str, int, int]], copies: Path) -> StoredRows:
    """A training reader over a snapshot; ``keyed`` holds key, tokens and first supervised index of each row."""
    cache = RowCache(store, "soft_labels", namespace)
    groups = ShardGroups(cache, cache.snapshot(), RangeCache(store, copies, _CACHE_BYTES), [key for key, _, _ in keyed])
    num_tokens, first = (np.array([entry[i] for entry in keyed], np.int32) for i in (1, 2))
    return StoredRows(groups, groups.group, groups.row, num_tokens=num_tokens, first_supervised=first)


def training_batches(rows: StoredRows, num_rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """One epoch in training order, steps asked for as far ahead as the training loop does."""
    ahead: deque[list[int]] = deque()
    for start in range(0, num_rows + PREFETCH_STEPS * _BATCH, _BATCH):
        if start < num_rows:
            ahead.append(step_rows(num_rows, _BATCH, seed=0, step=start // _BATCH)[: num_rows - start])
            rows.prefetch(ahead[-1], soft=True)
            if num_rows > 2 * EXPECTED_ROWS and start + EXPECTED_ROWS < num_rows:
                rows.expect(step_rows(num_rows, _BATCH, seed=0, step=(start + EXPECTED_ROWS) // _BATCH))
        if start < PREFETCH_STEPS * _BATCH:
            continue
        numbers = ahead.popleft()
        targets, tokens = rows.targets(numbers), rows.read(numbers)
        assert isinstance(targets, SampledTargets)
        yield {
            "ids": torch.from_numpy(np.concatenate([row.ids for row in tokens], dtype=np.int64)),
            "first": torch.tensor([row.first_supervised for row in tokens]),
            "lengths": targets.offsets_N1.diff(),
            "entries": targets.ids_E,
            "counts": targets.counts_E,
            "gold": targets.common.gold_logprob_N,
            "entropy": targets.common.entropy_N,
            "offset": targets.cross_entropy_offset_N,
        }


# ---------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class _Content:
    rows: list[TokenRow]
    targets: list[SampledTargets]
    keyed: list[tuple[str, TokenRow]]

    @property
    def places(self) -> list[tuple[str, int, int]]:
        return [(key, len(row.ids), row.first_supervised) for key, row in self.keyed]


def _content(num_rows: int) -> _Content:
    rows = token_rows(num_rows, num_columns=_COLUMNS)
    return _Content(
        rows, sampled_rows(rows, num_columns=_COLUMNS), [(soft_label_key("benchmark", row.ids, row.first_supervised), row) for row in rows]
    )


@contextmanager
def _server(home: Path) -> Iterator[Bucket]:
    before = dict(os.environ)
    with object_store(home) as info:
        os.environ.update(info.env)
        try:
            yield Bucket(info.urls["s3"], info.bucket, "peer")
        finally:
            os.environ.clear()
            os.environ.update(before)


def _digest(batches: Iterator[dict[str, torch.Tensor]]) -> tuple[int, int, int, int, float]:
    """Order-free sums over what was read: tokens, ids, entries, counts weighted by id; gold log-probabilities."""
    total, gold = np.zeros(4, np.int64), 0.0
    for batch in batches:
        total += [
            len(batch["ids"]),
            int(batch["ids"].sum()),
            int(batch["lengths"].sum()),
            int((batch["entries"] * batch["counts"]).sum()),
        ]
        gold += float(batch["gold"].double().sum())
    return (*(int(x) for x in total), gold)


def _same(one: tuple[int, int, int, int, float], other: tuple[int, int, int, int, float]) -> bool:
    return one[:4] == other[:4] and abs(one[4] - other[4]) <= 2e-3 * abs(other[4])


def run(*, num_rows: int, shard_rows: int, object_rows: int, repeats: int) -> list[Figure]:
    """Sequences a second.

    Args:
        num_rows: samples in the cache and in litdata's chunks.
        shard_rows: rows a shard.
        object_rows: samples read one object each: their rate does not depend on how many there are.
        repeats: of each side.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with _server(Path(scratch) / "s3") as place:
                return _compare(_content(num_rows), place, Path(scratch), shard_rows=shard_rows, object_rows=object_rows, repeats=repeats)
        except KDError as error:
            name = "cache -> training tensors, S3"
            return [figure(name, None, "sequences/s", Check(f"not run: {error}"), peer="one object a sample", goal=times_better(20))]


def _compare(content: _Content, place: Bucket, scratch: Path, *, shard_rows: int, object_rows: int, repeats: int) -> list[Figure]:
    num_rows = len(content.rows)
    store = S3Store(place.bucket, "ours", options=S3Options(endpoint=place.endpoint))
    cache = RowCache(store, "soft_labels", "benchmark")
    model = b""
    for start in range(0, num_rows, shard_rows):
        part = slice(start, start + shard_rows)
        table, metadata = soft_label_table(content.keyed[part], content.targets[part], model)
        model = metadata[CODEC_MODEL]
        cache.commit(table, num_tokens=sum(row.num_supervised for row in content.rows[part]), metadata=metadata)
    samples = [to_arrays(row, targets) for row, targets in zip(content.rows, content.targets, strict=True)]
    raw_arrays.write_objects(place, samples[:object_rows])
    numbers = itertools.count()

    def fresh() -> Path:
        return scratch / f"copies-{next(numbers)}"

    def ours() -> Iterator[dict[str, torch.Tensor]]:
        copies = fresh()
        yield from training_batches(open_rows(store, "benchmark", content.places, copies), num_rows)
        shutil.rmtree(copies, ignore_errors=True)

    picked = np.random.default_rng(0).permutation(object_rows)
    order = [picked[i : i + _BATCH].tolist() for i in range(0, object_rows, _BATCH)]
    chunks = Bucket(place.endpoint, place.bucket, "litdata")
    reason = raw_arrays.litdata_why_not()
    chunk_bytes = raw_arrays.write_litdata(chunks, samples, scratch / "litdata") if reason is None else None

    def litdata() -> Iterator[dict[str, torch.Tensor]]:
        copies = fresh()
        yield from raw_arrays.litdata_batches(chunks, _BATCH, copies)
        shutil.rmtree(copies, ignore_errors=True)

    figures = [_fetched_bytes(store, chunk_bytes, num_rows)]
    sides = {
        "boto3, one object a sample": (object_rows, lambda: raw_arrays.one_object_batches(place, order, threads=1)),
        "boto3, one object a sample, 16 at a time": (object_rows, lambda: raw_arrays.one_object_batches(place, order, threads=16)),
    }
    if reason is None:
        sides[f"litdata {raw_arrays.LITDATA}, raw arrays, from S3"] = (num_rows, litdata)
    mine, *theirs = in_turn(lambda: _drain(ours()), *(lambda side=side: _drain(side[1]()) for side in sides.values()), repeats=repeats)
    truth = {n: _digest(iter([from_arrays(samples[:n])])) for n in (num_rows, object_rows)}
    found = _digest(ours())
    for (peer, (count, side)), seconds in zip(sides.items(), theirs, strict=True):
        same = _same(found, truth[num_rows]) and _same(_digest(side()), truth[count])
        text = f"same content on both sides: {same}; {num_rows:,} rows, the peer {count:,}; cold; {timings(mine, seconds)}"
        goal = {"boto3, one object a sample": 20, "boto3, one object a sample, 16 at a time": None}.get(peer, 2)
        figures.append(_reading(num_rows / mine.wall, Check(text, same), peer, count / seconds.wall, goal))
    if reason is not None:
        figures.append(_reading(num_rows / mine.wall, Check(f"{num_rows:,} rows"), f"litdata: {reason}", None, 2))
    return figures


def _fetched_bytes(store: Store, litdata: int | None, num_rows: int) -> Figure:
    """What a link carries for a sequence: on one slower than this machine's memory, it is the rate."""
    ours = sum(info.size_bytes for info in store.list("rows/")) / num_rows
    theirs = None if litdata is None else litdata / num_rows
    text = f"all objects of {num_rows:,} rows, metadata included; the peer's arrays are int32 and float32, uncompressed"
    name, peer = "cache -> training tensors, bytes fetched", f"litdata {raw_arrays.LITDATA}, raw arrays"
    return figure(name, ours, "B/sequence", Check(text), less_is_better=True, peer=peer, peer_value=theirs)


def _reading(ours: float, check: Check, peer: str, value: float | None, goal: float | None) -> Figure:
    bound = None if goal is None else times_better(goal)
    return figure("cache -> training tensors, S3", ours, "sequences/s", check, peer=peer, peer_value=value, goal=bound)


def _drain(batches: Iterator[dict[str, torch.Tensor]]) -> None:
    for _ in batches:
        pass
