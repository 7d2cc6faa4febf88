"""Objects of buckets as local files, downloaded once a process.

A run reads a source more than once: for its hash, for its rows. The first one downloads it to a scratch folder, which is locked
for as long as the process lives; of more than ``KEPT_BYTES`` the oldest are let go, and downloaded again if they are asked for.
"""

import atexit
import itertools
import threading
from contextlib import ExitStack
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from kd_core.store.scratch import scratch

if TYPE_CHECKING:
    from kd_core.store import ObjectInfo, Store

__all__ = ["KEPT_BYTES", "open_fetched"]

KEPT_BYTES = 32 * 2**30
"""Bytes kept on disk; one larger object is still kept, alone."""
_WHOLE_BYTES = 2**20
"""Up to here an object is got whole, so that a server that knows no ranges can give small ones; larger ones come block by block."""

_lock = threading.Lock()
_kept: dict[tuple[object, ...], Path] = {}
_numbers = itertools.count()


def open_fetched(store: "Store", info: "ObjectInfo", state: tuple[object, ...]) -> BufferedReader:
    """Open an object's content for reading.

    Args:
        store: the bucket.
        info: the object.
        state: names the object, and changes when its content does.

    Raises:
        StoreError: it cannot be downloaded, or the scratch folder is full.
    """
    with _lock:
        if state not in _kept:
            _make_room(info.size_bytes)
            path = _folder() / str(next(_numbers))
            if info.size_bytes <= _WHOLE_BYTES:
                path.write_bytes(store.get(info.key))
            else:
                store.download(info.key, path)
            _kept[state] = path
        return _kept[state].open("rb")


def _make_room(num_bytes: int) -> None:
    """Let the oldest go; who has them open reads on."""
    while _kept and num_bytes + sum(path.stat().st_size for path in _kept.values()) > KEPT_BYTES:
        _kept.pop(next(iter(_kept))).unlink()


@cache
def _folder() -> Path:
    held = ExitStack()
    atexit.register(held.close)
    return held.enter_context(scratch())
