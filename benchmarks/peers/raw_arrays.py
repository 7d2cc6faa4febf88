"""A sample as others keep it: plain arrays, nothing packed. One object a sample through boto3, or litdata's chunks.

Axes: N positions, E entries. The content is ours: token ids, first supervised index, sampled targets and their statistics.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_core.softlabels.targets import SampledTargets
from kd_core.tokens.batches import TokenRow

__all__ = [
    "LITDATA",
    "Sample",
    "from_arrays",
    "litdata_batches",
    "litdata_why_not",
    "one_object_batches",
    "to_arrays",
    "write_litdata",
    "write_objects",
]

LITDATA = "0.2.76"
_NAMES = ("ids", "first", "lengths", "entries", "counts", "gold", "entropy", "offset")
_TYPES = ("<i4", "<i4", "<u2", "<i4", "<u2", "<f4", "<f4", "<f4")

Sample = Mapping[str, np.ndarray]


def to_arrays(row: TokenRow, targets: SampledTargets) -> dict[str, np.ndarray]:
    """One row's content as arrays."""
    values: tuple[Any, ...] = (
        row.ids,
        [row.first_supervised],
        targets.offsets_N1.diff(),
        targets.ids_E,
        targets.counts_E,
        targets.common.gold_logprob_N,
        targets.common.entropy_N,
        targets.cross_entropy_offset_N,
    )
    return {name: np.asarray(value).astype(dtype) for name, value, dtype in zip(_NAMES, values, _TYPES, strict=True)}


def from_arrays(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Training tensors of a batch: all samples' arrays one after the other; ids and counts as int64."""

    def joined(name: str) -> torch.Tensor:
        whole = np.concatenate([sample[name] for sample in samples])
        return torch.from_numpy(whole if whole.dtype == np.float32 else whole.astype(np.int64))

    return {name: joined(name) for name in _NAMES}


def _pack(sample: Sample) -> bytes:
    return struct.pack(f"<{len(_NAMES)}I", *(len(sample[name]) for name in _NAMES)) + b"".join(sample[name].tobytes() for name in _NAMES)


def _unpack(data: bytes) -> dict[str, np.ndarray]:
    sizes = struct.unpack_from(f"<{len(_NAMES)}I", data)
    found, at = {}, 4 * len(_NAMES)
    for name, dtype, size in zip(_NAMES, _TYPES, sizes, strict=True):
        found[name] = np.frombuffer(data, dtype, size, at)
        at += found[name].nbytes
    return found


@dataclass(frozen=True)
class Bucket:
    """Where the peer's objects are: a boto3 client's address and a prefix."""

    endpoint: str
    bucket: str
    prefix: str

    def client(self) -> Any:
        """A boto3 client with its defaults, but for 16 connections."""
        import boto3
        from botocore.config import Config

        return boto3.client("s3", endpoint_url=self.endpoint, config=Config(max_pool_connections=16))


# ---------------------------------------------------------------------------------------------- one object a sample


def write_objects(place: Bucket, samples: Sequence[Sample]) -> None:
    """One object each."""
    client = place.client()
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda i: client.put_object(Bucket=place.bucket, Key=f"{place.prefix}/{i}", Body=_pack(samples[i])), range(len(samples))
            )
        )


def one_object_batches(place: Bucket, order: Sequence[Sequence[int]], *, threads: int) -> Iterator[dict[str, torch.Tensor]]:
    """A get a sample, ``threads`` at a time, made into batches."""
    client = place.client()

    def get(number: int) -> Sample:
        return _unpack(client.get_object(Bucket=place.bucket, Key=f"{place.prefix}/{number}")["Body"].read())

    with ThreadPoolExecutor(threads) as pool:
        for batch in order:
            yield from_arrays([get(i) for i in batch] if threads == 1 else list(pool.map(get, batch)))


# ---------------------------------------------------------------------------------------------- litdata


def litdata_why_not() -> str | None:
    """Why litdata cannot be run; None if it can."""
    try:
        import litdata
    except ImportError as error:
        return f"not run: pip install litdata=={LITDATA} ({error})"
    return (
        None
        if litdata.__version__ == LITDATA
        else f"not run: litdata {litdata.__version__} is installed, {LITDATA} is the one to compare with"
    )


def write_litdata(place: Bucket, samples: Sequence[Sample], scratch: Path) -> int:
    """Chunks of 64 MB at most and their index, sent to the bucket; returns their bytes."""
    from litdata.streaming.cache import Cache

    scratch.mkdir()
    cache = Cache(str(scratch), chunk_bytes="64MB")
    for i, sample in enumerate(samples):
        cache[i] = dict(sample)
    cache.done()
    cache.merge(1)
    client = place.client()
    for path in sorted(scratch.iterdir()):
        client.upload_file(str(path), place.bucket, f"{place.prefix}/{path.name}")
    return sum(path.stat().st_size for path in scratch.iterdir())


def litdata_batches(place: Bucket, batch_rows: int, scratch: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Its streaming dataset, shuffled, from the bucket into an empty local cache, made into batches.

    Its fast path refuses http:// addresses; the one client option that allows them is set here.
    """
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = StreamingDataset(
        f"s3://{place.bucket}/{place.prefix}",
        cache_dir=str(scratch),
        shuffle=True,
        storage_options={
            "endpoint_url": place.endpoint,
            "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        },
    )
    batch: list[Sample] = []
    for sample in dataset:
        batch.append(sample)
        if len(batch) == batch_rows:
            yield from_arrays(batch)
            batch = []
    if batch:
        yield from_arrays(batch)
