"""Work that is done shard by shard: what is missing is computed, and a writer beside the worker commits it.

The worker (a teacher, mostly) goes on while its last shard is packed and sent. If the writer dies the work stops: no
row is computed that could not be kept. Several workers share the work without a lock: each takes every n-th shard, and
then whatever is still missing, so that the death of one of them costs time and nothing else.
"""

import queue
import random
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import pyarrow as pa

from kd_core.rows.table import RowCache, Snapshot

__all__ = ["Packed", "work_in_shards"]

Row = TypeVar("Row")
Found = TypeVar("Found")
T = TypeVar("T")

_WINDOW_SHARDS = 64
"""Held in memory while one worker finishes for others."""


@dataclass(frozen=True)
class Packed:
    """A shard's rows, ready to be committed.

    Attributes:
        rows: a table with a unique string column ``key``; may be empty if every row was refused.
        num_tokens: the work in it.
        metadata: for the shard's footer.
    """

    rows: pa.Table
    num_tokens: int
    metadata: dict[bytes, bytes] = field(default_factory=dict)


def work_in_shards(
    cache: RowCache,
    rows: Callable[[], Iterable[tuple[str, Row]]],
    compute: Callable[[list[tuple[str, Row]]], Found],
    pack: Callable[[Found], Packed],
    *,
    shard_rows: int,
    done: Callable[[int], None],
    worker: int = 0,
    num_workers: int = 1,
) -> tuple[Snapshot, int]:
    """Compute and commit the rows that the cache does not hold.

    The missing rows are cut into shards in the order given, so a run that was killed and started again computes the
    same shards as an unbroken one. Rows are taken from the iterator as they are needed.

    Args:
        cache: where rows are kept.
        rows: gives (key, input) in a fixed order, anew at each call; a key that stands twice is computed once.
        compute: the work on one shard's rows, in the caller's thread.
        pack: makes the table, in the writer's thread.
        shard_rows: rows a shard.
        done: called with the number of rows that are finished.
        worker: this process among those that do the same work at the same time, 0-based.
        num_workers: how many there are.

    Returns:
        A snapshot that holds all rows, and the number of rows computed now.

    Raises:
        Whatever ``compute``, ``pack`` or the store raises; what was computed before is committed.
    """
    held, tried = cache.snapshot(), set[str]()
    with _Writer(cache, pack, done) as writer:
        for only_mine in (True, False) if num_workers > 1 else (False,):
            shards = _missing(rows(), held.lines, shard_rows)
            for number, (num_held, shard) in enumerate(shards if only_mine or num_workers == 1 else _shuffled(shards, worker)):
                if only_mine or num_workers == 1:
                    done(num_held)
                if only_mine and number % num_workers != worker:
                    continue
                if num_workers > 1:  # others may have been here since
                    held = cache.snapshot(held)
                    shard = [(key, row) for key, row in shard if key not in held.lines and key not in tried]
                if shard:
                    tried.update(key for key, _ in shard)
                    writer.put(compute(shard), len(shard))
            writer.flush()
            held = cache.snapshot(held)
    return held, len(tried)


def _missing(rows: Iterable[tuple[str, Row]], held: Container[str], size: int) -> Iterator[tuple[int, list[tuple[str, Row]]]]:
    """Rows that are not held, each key once, cut into lists of ``size``; with each list the rows that were held on the way."""
    seen: set[str] = set()
    num_held, shard = 0, list[tuple[str, Row]]()
    for key, row in rows:
        if key in seen:
            continue
        seen.add(key)
        if key in held:
            num_held += 1
            continue
        shard.append((key, row))
        if len(shard) == size:
            yield num_held, shard
            num_held, shard = 0, []
    yield num_held, shard


def _shuffled(items: Iterable[T], seed: int) -> Iterator[T]:
    """Some at a time, each worker in an order of its own: those who finish for a slow one seldom do the same shard."""
    items, order = iter(items), random.Random(seed)
    while window := list(islice(items, _WINDOW_SHARDS)):
        order.shuffle(window)
        yield from window


class _Writer(Generic[Found]):
    """A thread that packs and commits, one shard behind the worker."""

    def __init__(self, cache: RowCache, pack: Callable[[Found], Packed], done: Callable[[int], None]) -> None:
        self._cache, self._pack, self._done = cache, pack, done
        self._queue: queue.Queue[tuple[Found, int] | None] = queue.Queue(maxsize=1)
        self._committed: queue.SimpleQueue[int] = queue.SimpleQueue()  # counts for ``done``, which is the caller's thread's
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def put(self, found: Found, rows: int) -> None:
        """Hand over a shard; raises what the writer died of."""
        self._queue.put((found, rows))
        self._report()

    def flush(self) -> None:
        """Wait until everything handed over is committed; raises what the writer died of."""
        self._queue.join()
        self._report()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    packed = self._pack(item[0])
                    if packed.rows.num_rows:
                        self._cache.commit(packed.rows, num_tokens=packed.num_tokens, metadata=packed.metadata)
                    self._committed.put(item[1])
                except BaseException as error:  # handed to the worker, who raises it
                    self._failure = error
            self._queue.task_done()

    def _report(self) -> None:
        while not self._committed.empty():
            self._done(self._committed.get())
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "_Writer[Found]":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._report()
