"""The binary column of a soft-label shard: whole rows to entropy-coded bytes and back.

Axes: N positions of all rows, R rows, E drawn ids, K ids of a top-k position, G temperatures, V columns, L levels.

    blob   version (1 byte), crc32 of model, version, labels and rest (4), [number of ids (4)], [exact float32 arrays], rANS words

Owns the frame of a blob and what is refused; the shard's model is ``model.py``'s, the numbers in whole steps are
``quantities.py``'s, their order in a row is ``events.py``'s.
"""

import functools
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from kd_core.errors import SoftLabelError
from kd_core.softlabels.codec.events import Draws, TopKRow
from kd_core.softlabels.codec.model import SAMPLED, TOPK, Header, Model, code_rows, dense_model
from kd_core.softlabels.codec.quantities import (
    ENTROPY_STEPS,
    GOLD_LOGPROB,
    choose_levels,
    entropy_of,
    gold_logprob_of,
    levels_of,
    logprob_of_level,
    quantise_entropy,
    quantise_gold,
)
from kd_core.softlabels.codec.rans import Stream
from kd_core.softlabels.codec.reading import DecodedRows, decode_sampled, decode_topk
from kd_core.softlabels.codec.writing import SampledRow, sampled_events, topk_events
from kd_core.softlabels.targets import Common, DenseTargets, SampledTargets, Targets, TopKTargets, concatenate
from kd_core.store.versions import VERSION, expect_version

__all__ = ["decode_rows", "encode_rows"]

_BLOB = struct.Struct("<BI")
_MAX_COLUMNS = 1 << 20
_RANK = _MAX_COLUMNS - 1


def encode_rows(rows: Sequence[Targets], labels: Sequence[np.ndarray], known: Model | None = None) -> tuple[bytes, list[bytes]]:
    """Make the model and the blobs of a shard's rows: see ``codec.encode_rows``."""
    whole = concatenate(list(rows))
    position_R1 = np.concatenate([[0], np.cumsum([len(row.common.gold_logprob_N) for row in rows])]).astype(np.int64)
    gold_N = _check_labels(labels, np.diff(position_R1), whole.common.num_columns)
    if bool(torch.isnan(whole.common.gold_logprob_N).any() | torch.isnan(whole.common.entropy_N).any()):
        raise SoftLabelError("soft labels hold NaN where an entropy or a gold log-probability should be; nothing was encoded")
    match whole:
        case SampledTargets():
            model, bodies = _encode_sampled(whole, gold_N, position_R1, known)
        case TopKTargets():
            model, bodies = _encode_topk(whole, position_R1, known)
        case DenseTargets():
            model = dense_model(whole.common.num_columns)
            bodies = [_dense_body(whole, first, end) for first, end in itertools.pairwise(position_R1)]
    sums = _checksums([model], np.zeros(len(bodies), np.int64), gold_N, position_R1, bodies)
    return model, [_BLOB.pack(VERSION, crc) + body for crc, body in zip(sums, bodies, strict=True)]


def _checksums(
    models: Sequence[bytes], model_R: np.ndarray, gold_N: np.ndarray, position_R1: np.ndarray, bodies: Sequence[bytes | memoryview]
) -> Iterator[int]:
    """CRC-32 of each row's model, version, labels and body. It goes on from the model's own, which is its end."""
    first = [zlib.crc32(bytes([VERSION]), int.from_bytes(model[-4:], "little")) for model in models]
    labels = gold_N.astype("<i8", copy=False).data.cast("B")
    spans = itertools.pairwise((8 * position_R1).tolist())
    for m, (start, end), body in zip(model_R.tolist(), spans, bodies, strict=True):
        yield zlib.crc32(body, zlib.crc32(labels[start:end], first[m]))


def _check_labels(labels: Sequence[np.ndarray], lengths: np.ndarray, num_columns: int) -> np.ndarray:
    found = [len(row) for row in labels]
    if found != lengths.tolist():
        raise SoftLabelError(f"labels of {sum(found)} positions in {len(found)} rows for soft labels of {sum(lengths)} in {len(lengths)}")
    gold_N = np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64)
    if len(gold_N) and not (gold_N.min() >= 0 and gold_N.max() < num_columns):
        raise SoftLabelError(f"a label lies outside the vocabulary of {num_columns} columns: {int(gold_N.min())} to {int(gold_N.max())}")
    return gold_N


def _check_ids(ids_E: np.ndarray, position_E: np.ndarray, num_columns: int) -> None:
    if num_columns > _MAX_COLUMNS:
        raise SoftLabelError(f"a vocabulary of {num_columns} columns; sampled and topk soft labels hold ids below {_MAX_COLUMNS}")
    if len(ids_E) and not (ids_E.min() >= 0 and ids_E.max() < num_columns):
        raise SoftLabelError(f"an id lies outside the vocabulary of {num_columns} columns: {int(ids_E.min())} to {int(ids_E.max())}")
    if bool((np.diff(np.sort(position_E * num_columns + ids_E)) == 0).any()):
        raise SoftLabelError("an id stands twice at one position; nothing was encoded")


@functools.lru_cache(maxsize=8)
def _draws(num_draws: int, temperature: float) -> Draws:
    counts = np.arange(num_draws + 1)
    entropy = np.rint(16 * ENTROPY_STEPS * counts * np.log(np.maximum(counts, 1))).astype(np.int64)
    gold = quantise_gold(np.log(np.maximum(counts, 1) / num_draws))
    return Draws(num_draws, temperature == 1.0, entropy, gold, float(ENTROPY_STEPS), GOLD_LOGPROB)


def _encode_sampled(targets: SampledTargets, gold_N: np.ndarray, position_R1: np.ndarray, known: Model | None) -> tuple[bytes, list[bytes]]:
    common, offsets_N1 = targets.common, targets.offsets_N1.cpu().numpy()
    ids_E, counts_E = targets.ids_E.cpu().numpy(), targets.counts_E.cpu().numpy()
    position_E = np.repeat(np.arange(len(gold_N)), np.diff(offsets_N1))
    _check_ids(ids_E, position_E, common.num_columns)
    drawn_N = np.bincount(position_E, counts_E, len(gold_N))
    if bool((drawn_N != targets.num_draws).any()) or (len(counts_E) and counts_E.min() < 1):
        raise SoftLabelError(f"draws do not add up: {targets.num_draws} a position expected, all counts positive; nothing was encoded")
    entropy_N = quantise_entropy(common.entropy_N)
    offset_N = entropy_N if targets.temperature == 1.0 else quantise_entropy(targets.cross_entropy_offset_N)
    gold_logprob_N = quantise_gold(common.gold_logprob_N.cpu().numpy())
    draws = _draws(targets.num_draws, targets.temperature)

    def events_by(rank_of_id_V: np.ndarray) -> Callable[[int, np.ndarray], int]:
        key_E = np.sort((position_E << 40) | ((targets.num_draws - counts_E) << 20) | rank_of_id_V[ids_E])
        ranks_E, ordered_E, gold_rank_N = key_E & _RANK, targets.num_draws - (key_E >> 20 & _RANK), rank_of_id_V[gold_N]

        def events(row: int, room: np.ndarray) -> int:
            first, end = position_R1[row], position_R1[row + 1]
            low, high = offsets_N1[first], offsets_N1[end]
            by_position = (array_N[first:end] for array_N in (gold_rank_N, offset_N, entropy_N, gold_logprob_N))
            part = SampledRow(offsets_N1[first : end + 1] - low, ranks_E[low:high], ordered_E[low:high], *by_position)
            return sampled_events(draws, part, room)

        return events

    ids_R = np.diff(offsets_N1[position_R1])
    rooms_R = 6 * np.diff(position_R1) + 2 * ids_R
    header = Header(SAMPLED, common.num_columns, targets.num_draws, temperatures=(targets.temperature,))
    model, words = code_rows(header, np.bincount(ids_E, minlength=common.num_columns), events_by, rooms_R, known)
    return model, [struct.pack("<I", num) + body for num, body in zip(ids_R, words, strict=True)]


def _encode_topk(targets: TopKTargets, position_R1: np.ndarray, known: Model | None) -> tuple[bytes, list[bytes]]:
    common, ids_NK = targets.common, targets.ids_NK.cpu().numpy()
    num, k = ids_NK.shape
    _check_ids(ids_NK.ravel(), np.repeat(np.arange(num), k), common.num_columns)
    if known is not None and known.header.policy != (TOPK, common.num_columns, k, targets.temperatures):
        known = None
    num_levels, lowest = choose_levels(targets, None if known is None else (known.header.num_levels, known.header.lowest))
    level_NK = levels_of(targets.logprobs_NK.double().cpu().numpy(), num_levels, targets.temperatures)
    entropy_N, gold_logprob_N = quantise_entropy(common.entropy_N), quantise_gold(common.gold_logprob_N.cpu().numpy())

    def events_by(rank_of_id_V: np.ndarray) -> Callable[[int, np.ndarray], int]:
        key_NK = np.sort(((num_levels - level_NK) << 20) | rank_of_id_V[ids_NK])
        whole = TopKRow(key_NK & _RANK, num_levels - (key_NK >> 20), entropy_N, gold_logprob_N)
        return lambda row, room: topk_events(TopKRow(*(array[position_R1[row] : position_R1[row + 1]] for array in whole)), room)

    header = Header(TOPK, common.num_columns, k, num_levels, lowest, targets.temperatures)
    count_V = np.bincount(ids_NK.ravel(), minlength=common.num_columns)
    model, words = code_rows(header, count_V, events_by, (3 + 2 * k) * np.diff(position_R1), known)
    if known is not None and model != known.data:
        return _encode_topk(targets, position_R1, None)  # with levels of its own too
    return model, [
        b"".join(part[first:end].tobytes() for part in _exact_parts(targets)) + body
        for first, end, body in zip(position_R1, position_R1[1:], words, strict=False)
    ]


def _exact_parts(targets: TopKTargets) -> list[np.ndarray]:
    """What is stored as float32: tails, unless everything is kept; normalisers, but for T = 1, where it is 0."""
    tail_NG, norm_NG = (tensor.cpu().numpy().astype("<f4") for tensor in (targets.log_tail_NG, targets.log_normalizer_NG))
    stored = [g for g, temperature in enumerate(targets.temperatures) if temperature != 1.0]
    return [tail_NG if targets.ids_NK.shape[1] < targets.common.num_columns else tail_NG[:, :0], norm_NG[:, stored]]


def _dense_body(targets: DenseTargets, first: int, end: int) -> bytes:
    """float32 as planes of their bytes, deflated: signs and exponents repeat, mantissas do not."""
    columns = [targets.common.gold_logprob_N[first:end, None], targets.common.entropy_N[first:end, None], targets.logprobs_NV[first:end]]
    values = torch.cat(columns, -1).cpu().numpy().astype("<f4")
    return zlib.compress(values.view(np.uint8).reshape(-1, 4).T.tobytes(), 6)


def decode_rows(models: Sequence[Model], model_R: np.ndarray, blobs: Sequence[bytes], labels: Sequence[np.ndarray]) -> Targets:
    """Make the targets of rows of some shards: see ``codec.decode_mixed_rows``."""
    header = models[0].header
    if any(model.header.policy != header.policy for model in models):
        raise SoftLabelError(f"soft labels of different kinds in one batch: {sorted({str(model.header.policy) for model in models})}")
    position_R1 = _offsets([len(gold) for gold in labels])
    gold_N = np.concatenate([np.zeros(0, np.int64), *labels], dtype=np.int64)
    bodies = [memoryview(blob)[_BLOB.size :] for blob in blobs]
    for i, blob in enumerate(blobs):
        if len(blob) < _BLOB.size:
            raise SoftLabelError(f"row {i}: {len(blob)} bytes are no soft labels; the row must be scored again")
        if blob[0] != VERSION:  # names are made for refusals only: a batch has many rows
            expect_version(blob[0], f"row {i}: soft labels")
    sums = _checksums([model.data for model in models], model_R, gold_N, position_R1, bodies)
    for i, (blob, crc) in enumerate(zip(blobs, sums, strict=True)):
        if crc != _BLOB.unpack_from(blob)[1]:
            raise SoftLabelError(
                f"row {i}: the checksum of its soft labels differs: they are damaged, or belong to other tokens or another shard's model; "
                "the row must be scored again"
            )
    rows_of = [(model, np.flatnonzero(model_R == i)) for i, model in enumerate(models)]
    if header.kind == SAMPLED:
        return _decode_sampled(rows_of, bodies, gold_N, position_R1)
    if header.kind == TOPK:
        return _decode_topk(rows_of, bodies, position_R1)
    return _decode_dense(models[0], bodies, len(gold_N))


def _stream(parts: Sequence[memoryview], position_R1: np.ndarray, ids_R: np.ndarray, num_events: int) -> Stream:
    """Words of rows, with room around them for the events that are decoded before the end is looked for, of three words at most."""
    room = bytes(6 * num_events + 2)
    words = np.frombuffer(b"".join([room, *parts, room]), "<u2")
    return Stream(words, len(room) // 2 + _offsets([len(part) // 2 for part in parts]), position_R1, _offsets(ids_R))


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _refuse(row: int) -> None:
    if row >= 0:
        raise SoftLabelError(f"row {row}: its soft labels end early or late although their checksum holds; the row must be scored again")


_RowsOf = list[tuple[Model, np.ndarray]]
"""Each model and the numbers of its rows, int64."""


def _decode_sampled(rows_of: _RowsOf, bodies: Sequence[memoryview], gold_N: np.ndarray, position_R1: np.ndarray) -> SampledTargets:
    header, num = rows_of[0][0].header, len(gold_N)
    ids_R = np.array([struct.unpack_from("<I", body)[0] for body in bodies], np.int64)
    stream = _stream([body[4:] for body in bodies], position_R1, ids_R, 2 * header.size + 8)
    offsets_N1, (ids_E, counts_E) = np.zeros(num + 1, np.int64), np.empty((2, int(ids_R.sum())), np.int64)
    out = DecodedRows(gold_N, offsets_N1, ids_E, counts_E, *np.empty((3, num), np.float32))
    draws = _draws(header.size, header.temperatures[0])
    for model, rows in rows_of:
        _refuse(decode_sampled(stream, rows, model.tables, draws, model.id_of_rank_V, out))
    offset_N, entropy_N, gold_logprob_N = map(torch.from_numpy, (out.cross_entropy_offset_N, out.entropy_N, out.gold_logprob_N))
    return SampledTargets(
        Common(gold_logprob_N, entropy_N, header.num_columns),
        header.temperatures[0],
        header.size,
        offset_N,
        torch.from_numpy(offsets_N1),
        torch.from_numpy(ids_E),
        torch.from_numpy(counts_E),
    )


def _decode_topk(rows_of: _RowsOf, bodies: Sequence[memoryview], position_R1: np.ndarray) -> TopKTargets:
    header, num = rows_of[0][0].header, int(position_R1[-1])
    grid = header.temperatures
    widths = (len(grid) if header.size < header.num_columns else 0, sum(temperature != 1.0 for temperature in grid))
    exact: list[list[np.ndarray]] = [[], []]
    parts = []
    for body, rows in zip(bodies, np.diff(position_R1).tolist(), strict=True):
        at = 0
        for arrays, width in zip(exact, widths, strict=True):
            arrays.append(np.frombuffer(body, "<f4", rows * width, at).reshape(rows, width))
            at += 4 * rows * width
        parts.append(body[at:])
    out = TopKRow(
        np.empty((num, header.size), np.int64), np.empty((num, header.size), np.int64), np.empty(num, np.int64), np.empty(num, np.int64)
    )
    stream = _stream(parts, position_R1, np.zeros(len(bodies), np.int64), 2 * header.size + 8)
    logprobs_NK = np.empty((num, header.size), np.float32)
    for model, rows in rows_of:
        _refuse(decode_topk(stream, rows, model.tables, model.id_of_rank_V, out))
        logprob_L = logprob_of_level(model.header.num_levels, model.header.lowest, grid).astype(np.float32)
        for row in rows:
            here = slice(position_R1[row], position_R1[row + 1])
            logprobs_NK[here] = logprob_L[out.levels_NK[here]]
    norm_NG, tail_NG = np.zeros((num, len(grid)), np.float32), np.full((num, len(grid)), -np.inf, np.float32)
    tail_NG[:, : widths[0]] = np.concatenate([np.zeros((0, widths[0])), *exact[0]])
    norm_NG[:, [temperature != 1.0 for temperature in grid]] = np.concatenate([np.zeros((0, widths[1])), *exact[1]])
    return TopKTargets(
        Common(gold_logprob_of(out.gold_q_N), entropy_of(out.entropy_q_N), header.num_columns),
        grid,
        torch.from_numpy(out.ranks_NK),
        torch.from_numpy(logprobs_NK),
        torch.from_numpy(norm_NG),
        torch.from_numpy(tail_NG),
    )


def _decode_dense(model: Model, bodies: Sequence[memoryview], num: int) -> DenseTargets:
    planes = [np.frombuffer(zlib.decompress(body), np.uint8).reshape(4, -1).T for body in bodies]
    floats = np.concatenate([np.zeros((0, 4), np.uint8), *planes]).view("<f4").astype(np.float32)
    values = torch.from_numpy(floats.reshape(num, model.header.num_columns + 2))
    return DenseTargets(Common(values[:, 0].clone(), values[:, 1].clone(), model.header.num_columns), values[:, 2:].clone())
