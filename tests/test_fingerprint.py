"""Canonical JSON: the same bytes in every process, every difference seen, everything doubtful refused."""

import copy
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.fingerprint import canonical_json, fingerprint, sha256_bytes, sha256_file

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    """The same data with every mapping in reverse order and tuples for lists."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return tuple(map(shuffled, value)) if isinstance(value, list) else value


@given(PLAIN)
def test_order_and_tuples_do_not_matter(value: Any) -> None:
    assert canonical_json(shuffled(value)) == canonical_json(value)
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


@given(PLAIN, PLAIN)
def test_equal_bytes_mean_equal_data(first: Any, second: Any) -> None:
    same = canonical_json(first) == canonical_json(second)
    assert same == (json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True))
    assert same == (fingerprint(first) == fingerprint(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, 1.0), (True, 1), (None, ""), ("1", 1), ([1, [2]], [[1], 2]), ({"a": None}, {}), ("é", "e\u0301"), (0.1, 0.1 + 1e-17 + 2e-17)],
)
def test_near_things_differ_or_are_the_same_number(first: Any, second: Any) -> None:
    assert (fingerprint(first) == fingerprint(second)) == (type(first) is type(second) and first == second)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [1, math.nan]}}, r"a\.b\[1\]: nan has no canonical form"),
        ({"a": math.inf}, r"a: inf has no canonical form"),
        ({"a": {1, 2}}, r"a: a set has no canonical form"),
        ({"a": {3: "x"}}, r"a: key 3 is a int; only str keys"),
        (b"x", r"value: a bytes has no canonical form"),
        ([object()], r"\[0\]: a object has no canonical form"),
    ],
)
def test_what_another_process_could_write_differently_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fingerprint(value)


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_fingerprints_are_equal_across_processes(hash_seed: str) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"z": "ü", "y": {"x": -0.0}}}
    code = f"from kd_core.fingerprint import fingerprint; print(fingerprint({value!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(copy.deepcopy(value))


def test_known_values_never_move() -> None:
    """These are the addresses of everything in every store: a change here loses all caches."""
    assert fingerprint({"a": 1, "b": [0.5, None, "x"]}) == sha256_bytes(b'{"a":1,"b":[0.5,null,"x"]}')[:32]
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_files_hash_as_their_bytes(tmp_path) -> None:
    data = bytes(range(256)) * (5 << 12)  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == sha256_bytes(data)
