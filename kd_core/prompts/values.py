"""The text of a value as its file has it, whatever the format.

A number keeps its digits: JSON's are taken as they are spelled, those of Arrow columns (Parquet, data sets) are written with
the fewest digits that read back as the same number of their width, a whole one without a point (18, not 18.0: an integer column
with a null in it has become one of floats on many a way). Truth is ``true`` and ``false``. Only null, and NaN in a column of
floats, which is how many programs write an absent number, are absent; "nan", "NA", "null" and "" are text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["after_space", "batch_rows", "decode_json", "decode_json_at"]

_SPACE = re.compile(r"[ \t\r\n]*")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return {key: ("true" if value else "false") if isinstance(value, bool) else value for key, value in found.items()}


def _constant(spelling: str) -> str | None:
    return None if spelling == "NaN" else spelling


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=str, parse_float=str, parse_constant=_constant)


def decode_json(text: str) -> Any:
    """The value of a JSON text, its numbers and booleans as text.

    Raises:
        ValueError: it is no JSON, a key stands twice, or it is nested too deeply.

    >>> decode_json('{"a": 5, "b": 5.0, "c": 1e16, "d": true, "e": null, "f": "nan"}')
    {'a': '5', 'b': '5.0', 'c': '1e16', 'd': 'true', 'e': None, 'f': 'nan'}
    """
    value, end = decode_json_at(text, 0)
    if end < len(text):
        raise ValueError(f"something follows the value: {text[end : end + 40]!r}")
    return value


def decode_json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that starts at a place, white space around it skipped, and the place after it."""
    try:
        value, end = _DECODER.raw_decode(text, after_space(text, start))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value, after_space(text, end)


def after_space(text: str, start: int) -> int:
    """The first place from `start` on that is no white space of JSON."""
    found = _SPACE.match(text, start)
    assert found is not None
    return found.end()


def batch_rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any]]:
    """The rows of an Arrow batch, column name -> text or None; lists, mappings and bytes as they are."""
    columns = [_texts(column) for column in batch.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _texts(column: pa.Array) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        places = column.indices.to_pylist()
        used = sorted({place for place in places if place is not None})
        texts = dict(zip(used, _texts(column.dictionary.take(pa.array(used, column.indices.type))), strict=True))
        return [None if place is None else texts[place] for place in places]
    if pa.types.is_boolean(kind):
        return [None if value is None else "true" if value else "false" for value in column.to_pylist()]
    if pa.types.is_floating(kind):
        numbers = column.to_numpy(zero_copy_only=False)
        return [None if np.isnan(number) else _float_text(number) for number in numbers]
    if pa.types.is_decimal(kind):
        return [None if value is None else f"{value:f}" for value in column.to_pylist()]
    if pa.types.is_nested(kind) or _is_bytes(kind):
        return column.to_pylist()  # type: ignore[no-any-return]
    return [None if value is None else str(value) for value in column.to_pylist()]


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _float_text(number: np.floating[Any]) -> str:
    """The fewest digits that read back, without a power of ten between 1e-7 and 1e21.

    >>> [_float_text(n) for n in (np.float32(3.14), np.float64(18), np.float64(1e16), np.float64(1e-5), np.float64(1e300))]
    ['3.14', '18', '10000000000000000', '0.00001', '1e+300']
    """
    if number == 0 or 1e-7 <= abs(float(number)) < 1e21:
        return np.format_float_positional(number, trim="-")
    return str(number)
