"""What all rows of a shard share: the policy, ids by frequency, and the entropy coder's tables.

    model  header, temperatures, class map of ids, tables of the entropy coder, crc32

Axes: R rows, V columns, C contexts of the coder, F families of contexts.

Shards of one capture are alike, so a writer goes on with the model that it has while it serves: a reader then holds one
model for many shards, and decodes rows of all of them in one call with tables that stay in the processor's cache.
"""

import itertools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kd_core.errors import SoftLabelError
from kd_core.softlabels.codec.events import ESCAPE, FAMILIES, RESIDUALS
from kd_core.softlabels.codec.ranking import classes_by_count, id_bits, pack_classes, ranks_of_classes, unpack_classes
from kd_core.softlabels.codec.rans import ALPHABET, Tables, add_events, code_bits, encode_events, make_tables, quantise_tables
from kd_core.softlabels.codec.writing import escape_unknown
from kd_core.store.versions import VERSION, expect_version

__all__ = ["DENSE", "SAMPLED", "TOPK", "Header", "Model", "code_rows", "dense_model", "parse_model"]

SAMPLED, TOPK, DENSE = 0, 1, 2
_MAGIC = b"KDSM"
_MODEL = struct.Struct("<4sBBIIIfII")  # magic, version, kind, V, size, levels, lowest, G, bytes of the class map
_WORSE = 1.02
"""A known model serves while rows take at most this many times the bytes they would with one of their own."""
_NEAR = 8  # symbols this close to one that was seen are expected too


class Header(NamedTuple):
    """What a model says before its tables.

    Attributes:
        kind: the rows' policy.
        num_columns: V.
        size: draws a position, k, or 0.
        num_levels: levels of p^(1/2Tmax) between 0 and 1, topk only.
        lowest: log-probability that level 0 stands for, topk only.
        temperatures: T0, the grid, or nothing.
    """

    kind: int
    num_columns: int
    size: int = 0
    num_levels: int = 0
    lowest: float = 0.0
    temperatures: tuple[float, ...] = ()

    @property
    def policy(self) -> tuple[int, int, int, tuple[float, ...]]:
        """What rows of one batch have in common: kind, columns, size, temperatures."""
        return self.kind, self.num_columns, self.size, self.temperatures


@dataclass(frozen=True)
class Model:
    """What all rows of a shard share.

    Attributes:
        header: policy and its numbers.
        data: the model as a shard's footer holds it; its checksum is its end.
        class_V: class of each id (``ranking``), uint8.
        id_of_rank_V: int32.
        tables: of the entropy coder.
    """

    header: Header
    data: bytes
    class_V: np.ndarray
    id_of_rank_V: np.ndarray
    tables: Tables


EventsBy = Callable[[np.ndarray], Callable[[int, np.ndarray], int]]
"""Rank of each id, int64, shape (V,) -> (row, room) -> number of the row's events, which are written into the room."""


def parse_model(data: bytes) -> Model:
    """A model from its bytes.

    Raises:
        SoftLabelError: not a model, or damaged.
        VersionError: a model of another version.
    """
    if len(data) < _MODEL.size + 4 or data[: len(_MAGIC)] != _MAGIC:
        raise SoftLabelError(f"{len(data)} bytes, beginning {data[:5]!r}, are no soft-label model; the shard must be scored again")
    expect_version(data[len(_MAGIC)], "a soft-label model")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise SoftLabelError("the soft labels' model is damaged: its checksum differs; the shard must be scored again")
    _, _, kind, num_columns, size, num_levels, lowest, num_temperatures, map_size = _MODEL.unpack_from(data)
    temperatures = struct.unpack_from(f"<{num_temperatures}d", data, _MODEL.size)
    at = _MODEL.size + 8 * num_temperatures
    class_V = unpack_classes(data[at : at + map_size], num_columns)
    codes_CA = np.frombuffer(zlib.decompress(data[at + map_size : -4]), np.uint8).reshape(-1, ALPHABET)
    header = Header(kind, num_columns, size, num_levels, lowest, temperatures)
    return Model(header, data, class_V, ranks_of_classes(class_V)[1].astype(np.int32), make_tables(_own_or_family(codes_CA)))


def dense_model(num_columns: int) -> bytes:
    """The model of a shard whose rows are not entropy-coded."""
    return _pack(Header(DENSE, num_columns), np.zeros(num_columns, np.uint8), np.zeros((0, ALPHABET), np.uint8))


def code_rows(
    header: Header, count_V: np.ndarray, events_by: EventsBy, rooms_R: np.ndarray, known: Model | None
) -> tuple[bytes, list[bytes]]:
    """Rows under the known model if it serves them, else under one of their own; two passes, as one row's events are what fits in memory.

    Args:
        header: of these rows.
        count_V: how often each id occurs, int64.
        events_by: makes the rows' events.
        rooms_R: the most events each row may have, int64.
        known: a model at hand.

    Returns:
        The model's bytes and each row's words.
    """
    room = np.zeros((int(rooms_R.max()), 4), np.int64)
    class_V = classes_by_count(count_V)
    if known is not None and known.header == header and id_bits(count_V, known.class_V) <= _WORSE * id_bits(count_V, class_V):
        events = events_by(ranks_of_classes(known.class_V)[0])
        if _serves(known.tables, _histogram(events, room, len(rooms_R))):
            return known.data, _words(events, room, len(rooms_R), known.tables)
    events = events_by(ranks_of_classes(class_V)[0])
    model = parse_model(_pack(header, class_V, _choose_tables(_histogram(events, room, len(rooms_R)))))
    return model.data, _words(events, room, len(rooms_R), model.tables)


def _histogram(events: Callable[[int, np.ndarray], int], room: np.ndarray, num_rows: int) -> np.ndarray:
    histogram_CA = np.zeros((FAMILIES[-1], ALPHABET), np.int64)
    for row in range(num_rows):
        add_events(room[: events(row, room)], histogram_CA)
    return histogram_CA


def _words(events: Callable[[int, np.ndarray], int], room: np.ndarray, num_rows: int, tables: Tables) -> list[bytes]:
    words, bodies, frequency_CA = np.zeros(3 + 3 * len(room), np.uint16), [], tables.frequencies()
    for row in range(num_rows):
        events_X4 = room[: events(row, room)]
        escape_unknown(events_X4, frequency_CA)
        first = encode_events(events_X4, tables, words)
        bodies.append(words[first:].astype("<u2").tobytes())
    return bodies


def _serves(tables: Tables, histogram_CA: np.ndarray) -> bool:
    """Whether tables can say all that occurs, and cost about what the best ones would, their own bytes included."""
    frequency_CA = tables.frequencies()
    unknown_C = np.where(frequency_CA == 0, histogram_CA, 0).sum(1)
    escapes_C = np.isin(np.arange(len(unknown_C)), RESIDUALS) & (frequency_CA[:, ESCAPE] > 0)
    if bool((unknown_C[~escapes_C] > 0).any()):
        return False
    codes_CA = _choose_tables(histogram_CA)
    own_bits = float(code_bits(histogram_CA, make_tables(_own_or_family(codes_CA))).sum()) + 8 * len(zlib.compress(codes_CA.tobytes(), 6))
    return float(code_bits(histogram_CA, tables).sum()) + 32 * int(unknown_C.sum()) <= _WORSE * own_bits


def _pack(header: Header, class_V: np.ndarray, codes_CA: np.ndarray) -> bytes:
    kind, num_columns, size, num_levels, lowest, temperatures = header
    class_map = pack_classes(class_V)
    data = _MODEL.pack(_MAGIC, VERSION, kind, num_columns, size, num_levels, lowest, len(temperatures), len(class_map))
    data += struct.pack(f"<{len(temperatures)}d", *temperatures) + class_map + zlib.compress(codes_CA.tobytes(), 6)
    return data + zlib.crc32(data).to_bytes(4, "little")


def _own_or_family(codes_CA: np.ndarray) -> np.ndarray:
    """Codes of all contexts: the stored ones are one a family of contexts, then one a context, 0 where the family's serves."""
    if not len(codes_CA):
        return codes_CA
    family_FA, own_CA = codes_CA[: len(FAMILIES) - 1], codes_CA[len(FAMILIES) - 1 :]
    return np.where(own_CA.any(1, keepdims=True), own_CA, np.repeat(family_FA, np.diff(FAMILIES), axis=0))


def _choose_tables(histogram_CA: np.ndarray) -> np.ndarray:
    """Codes as ``_own_or_family`` reads them: a context gets a table of its own where that saves more than it takes.

    Every symbol that its family has seen, or nearly, gets at least the smallest share: other shards may need it.
    """
    own_CA = quantise_tables(histogram_CA)
    family_FA = np.zeros((len(FAMILIES) - 1, ALPHABET), np.uint8)
    for f, (first, end) in enumerate(itertools.pairwise(FAMILIES)):
        part_CA = histogram_CA[first:end]
        expected_A = np.convolve(part_CA.sum(0) > 0, np.ones(2 * _NEAR + 1), "same") > 0
        expected_A[ESCAPE] |= first in RESIDUALS
        own_CA[first:end] = np.maximum(own_CA[first:end], expected_A)
        own_bits_C = code_bits(part_CA, make_tables(own_CA[first:end]))
        shared_CA = np.repeat(np.maximum(quantise_tables(part_CA.sum(0, keepdims=True)), expected_A), len(part_CA), axis=0)
        worth_C = code_bits(part_CA, make_tables(shared_CA)) - own_bits_C > 8 + 6 * (part_CA > 0).sum(1)  # bits in the model, compressed
        own_CA[first:end][~worth_C] = 0
        family_FA[f] = np.maximum(quantise_tables(part_CA[~worth_C].sum(0, keepdims=True))[0], expected_A)
    return np.concatenate([family_FA, own_CA])
