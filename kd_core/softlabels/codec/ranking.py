"""Ids by how often they occur: rank 0 is the most frequent, so that a set of ids is a set of small numbers.

Axes: V vocabulary columns. Ids fall into half-octave classes of their count; inside a class they stay in id order, so what
a model stores is one class an id. A class map costs bytes: ids seen less than a threshold stay in class 0, and the
threshold is the one that makes map and ids together smallest. A few rows give no map at all: the rank is the id.
"""

import zlib

import numpy as np

__all__ = ["classes_by_count", "id_bits", "pack_classes", "ranks_of_classes", "unpack_classes"]

_THRESHOLDS = (1, 2, 4, 8, 32)


def classes_by_count(count_V: np.ndarray) -> np.ndarray:
    """The cheapest class map for these counts, uint8, shape (V,); all zero where none pays."""
    total = int(count_V.sum())
    best_V, best_bits = np.zeros(len(count_V), np.uint8), float(total * np.log2(max(len(count_V), 2)))
    for threshold in _THRESHOLDS:
        class_V = np.where(count_V >= threshold, 1 + np.floor(2 * np.log2(np.maximum(count_V, 1) / threshold)), 0).astype(np.uint8)
        bits = id_bits(count_V, class_V) + 8 * len(pack_classes(class_V))
        if bits < best_bits:
            best_V, best_bits = class_V, bits
    return best_V


def id_bits(count_V: np.ndarray, class_V: np.ndarray) -> float:
    """Bits of all ids, one by one, with the frequencies of their classes: what a class map is worth."""
    mass_C, size_C = np.bincount(class_V, count_V), np.bincount(class_V)
    used_C = mass_C > 0
    return float((mass_C[used_C] * np.log2(count_V.sum() * size_C[used_C] / mass_C[used_C])).sum())


def ranks_of_classes(class_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rank of each id, id of each rank), int64: by falling class, then by id."""
    id_of_rank_V = np.argsort(-class_V.astype(np.int64), kind="stable")
    rank_of_id_V = np.empty_like(id_of_rank_V)
    rank_of_id_V[id_of_rank_V] = np.arange(len(class_V))
    return rank_of_id_V, id_of_rank_V


def pack_classes(class_V: np.ndarray) -> bytes:
    """A class map as bytes; nothing where every class is 0."""
    return zlib.compress(class_V.tobytes(), 6) if class_V.any() else b""


def unpack_classes(data: bytes, num_columns: int) -> np.ndarray:
    """The class map of ``pack_classes``: uint8, shape (num_columns,)."""
    return np.frombuffer(zlib.decompress(data), np.uint8) if data else np.zeros(num_columns, np.uint8)
