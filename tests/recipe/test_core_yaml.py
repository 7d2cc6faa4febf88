"""YAML as version 1.2 has it, its bounds, and that what is written is what is read."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kd_core.errors import RecipeError
from kd_core.recipe.core_yaml import read_value, read_yaml, write_yaml

LOOKALIKES = """yes no on off y n Yes 1:30 1_000 0b1 2024-01-01 #### << = 0o9 0x +.5.5 1e 1e-4x . - _ ~x nil 12:30:45 1,000 .inf. +0x1
-0o7 & * @ `"""
TEXTS = LOOKALIKES.split()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("012", 12),
        ("-012", -12),
        ("0o14", 12),
        ("0x1F", 31),
        ("+3", 3),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        (".INF", math.inf),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("", None),
        ('"012"', "012"),
        ("'no'", "no"),
        ("[no, 012, 1:30]", ["no", 12, "1:30"]),
        ("{on: off}", {"on": "off"}),
    ],
)
def test_scalars_of_the_core_schema(text: str, value: Any) -> None:
    assert read_value(text, "x") == value
    assert type(read_value(text, "x")) is type(value)
    assert read_yaml(f"a: {text}", "x") == {"a": value}


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in "####&*@`-<<="])
def test_what_another_version_reads_as_a_value_is_text(text: str) -> None:
    assert read_value(text, "x") == text
    assert read_yaml(f"a: {text}", "x") == {"a": text}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2", "x:2:1: not valid YAML: key 'a' stands twice"),
        ("a: &a [*a]", "x:1:4: not valid YAML: an alias stands for a value that holds it"),
        ("a: " + "[" * 60 + "]" * 60, "x:1:53: not valid YAML: nested deeper than 50"),
        ("a: " + "[" * 100_000, "x:1:53: not valid YAML: nested deeper than 50"),
        ("\n".join(f"{'  ' * i}a:" for i in range(700)), "x:50:99: not valid YAML: nested deeper than 50"),
        ("a: " + "9" * 6000, "x:1:4: not valid YAML: a number of 6,000 digits"),
        ("a: 0x" + "9" * 6000, "x:1:4: not valid YAML: a number of 6,002 digits"),
        ("a: 1\nb: \x00", "x:2: not valid YAML: the character U+0000 may not stand in it"),
        ("a: \x1b[2J", "x:1: not valid YAML: the character U+001B may not stand in it"),
        ("a: 1\n---\nb: 2", "x:2:1: not valid YAML: but found another document"),
        ("a" * 1_000_001, "x: 1,000,001 characters are no recipe"),
    ],
)
def test_what_is_out_of_bounds_is_one_line_with_its_place(text: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "x")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_aliases_are_one_value_each_but_no_bomb() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a", "x") == {"a": [1, 2], "b": [1, 2]}
    bomb = "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
    with pytest.raises(RecipeError, match=r"^x:\d+:\d+: not valid YAML: aliases make more than 100,000 values of it$"):
        read_yaml(bomb, "x")


@pytest.mark.parametrize("text", ["[a] # b", '"a" # b', "{a: b # c\n}", "[a, # b\n c]"])
def test_no_part_of_an_override_vanishes_as_a_comment(text: str) -> None:
    with pytest.raises(RecipeError, match="from a # on would be lost as a comment; put the text in quotes"):
        read_value(text, "x")


def test_a_number_too_long_for_an_override_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"^x: a number of 6,000 digits$"):
        read_value("9" * 6000, "x")


SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text() | st.sampled_from(TEXTS)
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(TEXTS), inner, max_size=4)
)


@given(DATA)
@example({"\x85": None})
def test_what_is_written_is_what_either_version_reads(data: Any) -> None:
    text = write_yaml(data)
    assert read_yaml(text, "x") == data
    assert yaml.safe_load(text) == data
