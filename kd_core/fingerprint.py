"""Canonical JSON and the hash over it: the identity of every stage and row.

Owns the one way in which a value becomes a fingerprint. It refuses whatever another process could serialise
differently (sets, NaN, objects, non-string keys) instead of guessing.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

__all__ = ["canonical_json", "fingerprint", "sha256_bytes", "sha256_file"]

FINGERPRINT_HEX = 32


def _canonical(value: object, path: str) -> object:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{path or 'value'}: {value!r} has no canonical form; use None or a finite number")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path or 'value'}: key {key!r} is a {type(key).__name__}; only str keys have a canonical form")
        return {key: _canonical(value[key], f"{path}.{key}".lstrip(".")) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{path or 'value'}: a {type(value).__name__} has no canonical form; pass str, int, float, bool, None, list or dict")


def canonical_json(value: object) -> bytes:
    """Serialise plain data to the same bytes in every process and on every machine.

    Raises:
        TypeError: for anything but None, bool, int, finite float, str, list, tuple and str-keyed mappings.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    plain = _canonical(value, "")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: object) -> str:
    """Hash plain data to 32 hex digits (128 bits of sha256 over its canonical JSON).

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(value)).hexdigest()[:FINGERPRINT_HEX]


def sha256_bytes(data: bytes) -> str:
    """Full sha256 of a byte string, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Full sha256 of a file, read in 4 MiB blocks, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()
