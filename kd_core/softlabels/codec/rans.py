"""Range asymmetric numeral systems (rANS) with static tables: events to bytes and back, compiled.

An event is (context, symbol, raw bits): the symbol is coded with its context's table, the raw bits are stored as they are.
A row's words are the symbols', in reading order, then the raw bits', last word first: a decoder goes from both ends to
the middle, and does not wait for the state to know the raw bits.
The state lives in [2^16, 2^32) and moves 16-bit words; tables are quantised to 10 bits, so a symbol costs at least 1/710 bit.
Source: Duda 2013 (arXiv 1311.2540), the static table form; events and table format ours.

Owns the coder and its tables; what an event means belongs to ``events.py``. It trusts its input: a caller checks a
checksum first, and a stream that ends early or late is reported as a status, never read past its end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba.cpython.unsafe.numbers import leading_zeros

__all__ = [
    "ALPHABET",
    "Cursor",
    "Stream",
    "Tables",
    "add_events",
    "bucket",
    "bucket_base",
    "closes",
    "code_bits",
    "compiled",
    "encode_events",
    "inlined",
    "make_tables",
    "octave",
    "open_row",
    "overran",
    "place",
    "pop_raw",
    "pop_symbol",
    "pop_value",
    "quantise_tables",
]

PRECISION = 10  # bits of a table: 12 cost 0.01 bytes a position less and decode 1.4 times slower, as tables leave the cache
ALPHABET = 96  # symbols a context may use; bucket() of 2^20 is 79
_SYMBOL_BITS = 7  # room for them
_LOW = 1 << 16
_WEIGHTS = np.array([0] + [round(2 ** (code / 4 + 8)) for code in range(4 * PRECISION + 1)], np.int64)

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """numba.njit with the on-disk cache, keeping the function's type; such a function allocates nothing.

    The cache goes by the file of the function alone: whoever changes what is inlined from another file deletes __pycache__.
    Without numba's runtime an array handed to a small function is not counted: that alone made decoding several times faster.
    """
    return cast(Function, numba.njit(cache=True, nogil=True, _nrt=False)(function))


def inlined(function: Function) -> Function:
    """Like ``compiled``, for what is called for every symbol: an array is up to nine arguments of a call that is not inlined."""
    return cast(Function, numba.njit(forceinline=True, _nrt=False)(function))


@inlined
def octave(value: int) -> int:
    """Number of bits of a whole number >= 0, an int64."""
    return 64 - int(leading_zeros(np.int64(value)))


@inlined
def bucket(value: int) -> tuple[int, int]:
    """Symbol and number of raw low bits of a whole number >= 0: exact below 4, then four buckets an octave."""
    if value < 4:
        return value, 0
    exponent = octave(value) - 1
    return 4 * (exponent - 1) + ((value >> (exponent - 2)) & 3), exponent - 2


@inlined
def bucket_base(symbol: int) -> tuple[int, int]:
    """Smallest value of a bucket and its number of raw bits: the inverse of ``bucket``, without a branch."""
    bits = max((symbol >> 2) - 1, 0)
    return ((4 if symbol > 3 else 0) + (symbol & 3)) << bits, bits


class Tables(NamedTuple):
    """Static frequencies of C contexts in T different tables, each once and narrow: decoding is as fast as they stay in the cache.

    One line each, so that a place is a sum: every symbol waits for these loads.

    Attributes:
        first_C: int32, the first slot of each context's table.
        symbol_S: int8, the symbol of each slot, 2^PRECISION a table.
        share_X: int32, 2^16 x frequency + exclusive cumulative frequency of each symbol, 2^_SYMBOL_BITS a table: frequencies sum
            to 2^PRECISION, or to 0 where no event has a context of this table.
    """

    first_C: np.ndarray
    symbol_S: np.ndarray
    share_X: np.ndarray

    def frequencies(self) -> np.ndarray:
        """int64, shape (C, ALPHABET)."""
        share_TA = self.share_X.reshape(-1, 1 << _SYMBOL_BITS)[:, :ALPHABET]
        return np.asarray(share_TA[self.first_C >> PRECISION].astype(np.int64) >> 16)


class Stream(NamedTuple):
    """Words of R rows, one after the other, and what each row begins with.

    Attributes:
        words: uint16, and some before and after those of the rows, to be read before it is seen that a row is over.
        words_R1, positions_R1, ids_R1: int64 offsets of each row's words, positions and ids.
    """

    words: np.ndarray
    words_R1: np.ndarray
    positions_R1: np.ndarray
    ids_R1: np.ndarray


Cursor = tuple[int, int, int]
"""Where a decoder is in a row: (state, next word, 16 x the row's end less the raw bits taken so far)."""


def quantise_tables(histogram_CA: np.ndarray) -> np.ndarray:
    """Histograms as one byte a symbol, a quarter of an octave fine: what a model stores of its tables.

    Args:
        histogram_CA: int64 counts, shape (C, ALPHABET).

    Returns:
        uint8: 0 where a symbol never occurs, otherwise 1 + 4 log2 of its share in 2^-PRECISION (at least one of them).
    """
    share_CA = histogram_CA * ((1 << PRECISION) / np.maximum(histogram_CA.sum(1, keepdims=True), 1))
    return np.where(histogram_CA > 0, 1 + np.rint(4 * np.log2(np.maximum(share_CA, 1))), 0).astype(np.uint8)


def make_tables(codes_CA: np.ndarray) -> Tables:
    """Tables from what ``quantise_tables`` gave; whole-number arithmetic, so every machine makes the same."""
    names, table_C = np.unique(codes_CA.view(f"V{ALPHABET}").ravel(), return_inverse=True)
    codes_TA = names.view(np.uint8).reshape(-1, ALPHABET)
    weight_TA = _WEIGHTS[codes_TA]
    total_T1 = np.maximum(weight_TA.sum(1, keepdims=True), 1)
    room_T1 = (1 << PRECISION) - (codes_TA > 0).sum(1, keepdims=True)  # after one slot for each symbol that occurs
    freq_TA = np.where(codes_TA > 0, 1 + weight_TA * room_T1 // total_T1, 0)
    used_T = freq_TA.any(1)
    freq_TA[used_T, freq_TA[used_T].argmax(1)] += (1 << PRECISION) - freq_TA[used_T].sum(1)
    symbol_TS = np.zeros((len(freq_TA), 1 << PRECISION), np.int8)
    symbols = np.tile(np.arange(ALPHABET, dtype=np.int8), int(used_T.sum()))
    symbol_TS[used_T] = np.repeat(symbols, freq_TA[used_T].ravel()).reshape(-1, 1 << PRECISION)
    share_TA = np.zeros((len(freq_TA), 1 << _SYMBOL_BITS), np.int32)
    share_TA[:, :ALPHABET] = (freq_TA << 16) + np.cumsum(freq_TA, axis=1) - freq_TA
    return Tables((table_C << PRECISION).astype(np.int32), symbol_TS.ravel(), share_TA.ravel())


def code_bits(histogram_CA: np.ndarray, tables: Tables) -> np.ndarray:
    """Bits that events of a histogram take with given tables, float64, shape (C,); every symbol must have a frequency."""
    return np.asarray((histogram_CA * (PRECISION - np.log2(np.maximum(tables.frequencies(), 1)))).sum(1))


@compiled
def add_events(events_X4: np.ndarray, histogram_CA: np.ndarray) -> None:
    """Count events into a histogram of contexts and symbols."""
    for x in range(len(events_X4)):
        histogram_CA[events_X4[x, 0], events_X4[x, 1]] += 1


@compiled
def encode_events(events_X4: np.ndarray, tables: Tables, words: np.ndarray) -> int:
    """Write events backwards into ``words`` (uint16), so that a decoder reads them forwards.

    Args:
        events_X4: int64 (context, symbol, number of raw bits, raw bits), in decoding order.
        tables: with a frequency for every symbol that occurs.
        words: room, at least 3 + 3 x events words.

    Returns:
        First used index of ``words``: the stream is words[index:].
    """
    at, held, num_held = len(words), 0, 0
    for x in range(len(events_X4)):
        held |= events_X4[x, 3] << num_held
        num_held += events_X4[x, 2]
        while num_held >= 16:
            at -= 1
            words[at] = held & 0xFFFF
            held >>= 16
            num_held -= 16
    if num_held:
        at -= 1
        words[at] = held
    state = _LOW
    for x in range(len(events_X4) - 1, -1, -1):
        share = tables.share_X[(tables.first_C[events_X4[x, 0]] >> (PRECISION - _SYMBOL_BITS)) + events_X4[x, 1]]
        freq, start = share >> 16, share & 0xFFFF
        if state >= freq << (32 - PRECISION):
            at -= 1
            words[at] = state & 0xFFFF
            state >>= 16
        state = ((state // freq) << PRECISION) + state % freq + start
    words[at - 1] = state & 0xFFFF
    words[at - 2] = state >> 16
    return at - 2


@inlined
def place(index: Any) -> Any:
    """An index that is not below 0: numba looks whether a signed one counts from the end, and the next symbol waits for that."""
    return np.uint64(index)


@inlined
def _signed(value: Any) -> Any:
    return np.int64(value)


@inlined
def open_row(stream: Stream, row: int) -> Cursor:
    """The start of a row."""
    at, end = stream.words_R1[row], stream.words_R1[row + 1]
    return (_signed(stream.words[at]) << 16) | _signed(stream.words[at + 1]), at + 2, end << 4


@inlined
def overran(cursor: Cursor) -> bool:
    """Whether more was taken from a row than it has."""
    return cursor[1] > cursor[2] >> 4


@inlined
def closes(cursor: Cursor) -> bool:
    """Whether this is the end of a row."""
    return cursor[0] == _LOW and cursor[1] == cursor[2] >> 4


@inlined
def _refill(stream: Stream, state: int, at: int) -> tuple[int, int]:
    """State and next word after a word was read if it was time: half the time it is, so no branch could be foreseen."""
    low = _signed(state < _LOW)
    return (state << (low << 4)) | (_signed(stream.words[place(at)]) & -low), at + low


@inlined
def pop_symbol(stream: Stream, tables: Tables, context: int, cursor: Cursor) -> tuple[int, Cursor]:
    """One symbol off the stream."""
    state, at, raw = cursor
    first, slot = _signed(tables.first_C[place(context)]), state & ((1 << PRECISION) - 1)
    symbol = _signed(tables.symbol_S[place(first + slot)])
    share = _signed(tables.share_X[place((first >> (PRECISION - _SYMBOL_BITS)) + symbol)])
    state, at = _refill(stream, (share >> 16) * (state >> PRECISION) + slot - (share & 0xFFFF), at)
    return symbol, (state, at, raw)


@inlined
def pop_raw(stream: Stream, bits: int, cursor: Cursor) -> tuple[int, Cursor]:
    """``bits`` raw bits (17 at most) off the stream: two words always have them."""
    state, at, raw = cursor
    word = (raw - 1) >> 4
    window = _signed(stream.words[place(word)]) | (_signed(stream.words[place(word - 1)]) << 16)
    return (window >> (-raw & 15)) & ((1 << bits) - 1), (state, at, raw - bits)


@inlined
def pop_value(stream: Stream, tables: Tables, context: int, cursor: Cursor) -> tuple[int, Cursor]:
    """One number that was put as its bucket."""
    symbol, cursor = pop_symbol(stream, tables, context, cursor)
    base, bits = bucket_base(symbol)
    raw, cursor = pop_raw(stream, bits, cursor)
    return base + raw, cursor
