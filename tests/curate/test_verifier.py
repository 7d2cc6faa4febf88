# ruff: noqa: RUF001
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.curate import final_answer, judge, verify
from kd_core.curate.canonical import canonical
from kd_core.curate.extraction import read_final
from kd_core.curate.forms import Bracket, Equation, Formula, Listing, Matrix, Text
from kd_core.curate.numbers import Number, Unit, read_number
from kd_core.curate.reading import MAX_CHARACTERS, read_form
from kd_core.recipe import Task

EXACT = Task(template="plain", verifier="exact")
MATH = Task(template="plain", verifier="math")
GSM8K = Task(template="plain", verifier="math", answer_marker="####")


def test_the_final_answer_follows_the_last_marker() -> None:
    assert final_answer("a #### 1\n#### 2 \n", GSM8K) == "2"
    assert final_answer("a ####", GSM8K) == ""
    assert final_answer("a ### 1", GSM8K) is None
    assert final_answer(" all of it\n", MATH) == "all of it"


def test_no_marker_is_wrong_even_where_the_number_is_there() -> None:
    assert judge("#### 16", "16", GSM8K) == "right"
    assert judge("16", "16", GSM8K) == "wrong"
    assert judge("####", "16", GSM8K) == "wrong"


def test_the_first_line_after_a_marker_counts_whatever_is_explained_below() -> None:
    assert judge("#### 18\n\nExplanation: 3 times 6", "18", GSM8K) == "right"
    assert judge("#### 18\n\nExplanation: 3 times 6", "6", GSM8K) == "wrong"
    assert judge("####\n18", "18", GSM8K) == "right"
    assert judge("#### It is\n\\boxed{18}", "18", GSM8K) == "right"


def test_exact_is_equal_text_after_trimming() -> None:
    assert judge(" ok\n", "ok", EXACT) == "right"
    assert judge("016", "16", EXACT) == "wrong"
    assert judge("OK", "ok", EXACT) == "wrong"


def test_what_cannot_be_read_is_undecided_and_not_right() -> None:
    for text in ("\\frac{", "12 16", "4 10/3", "\\boxed{}", "\\boxed{4", "1, 2, \\ldots, n", "the answer is not 42"):
        assert judge(text, "42", MATH) == "undecided"
        assert not verify(text, "42", MATH)
    assert judge("41", "42", MATH) == "wrong"
    assert judge("\\text{even}", "42", MATH) == "wrong"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1 1/4", Fraction(-5, 4)),
        ("2\\frac{1}{3}", Fraction(7, 3)),
        ("11,\\! 111,\\! 111,\\! 100", Fraction(11_111_111_100)),
        ("1\u202f234", Fraction(1234)),
        ("３×10⁵", Fraction(300_000)),
        ("-½", Fraction(-1, 2)),
        ("0.\\overline{3}", Fraction(1, 3)),
        ("1.6 \\times 10^{-19}", Fraction(16, 10**20)),
        ("$-5", Fraction(-5)),
        ("3 million dollars", Fraction(3_000_000)),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction) -> None:
    found = read_number(canonical(text))
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize("text", ["12 16", "4 10/3", "1,08", "5xy", "2 x", "5 or more", "1/0", "--5", "5 hours 30 minutes", "2k+2", "1 2"])
def test_what_is_no_number_as_a_whole_has_none_in_it(text: str) -> None:
    assert read_number(canonical(text)) is None


def test_units_are_taken_off_and_only_measures_are_compared() -> None:
    assert read_number("70 cm") == Number(Fraction(70), "integer", unit=Unit("cm", 1))
    assert read_number("70 centimeters") == read_number("70 cm")
    assert read_number(canonical("70\\text{ cm}^2")) == Number(Fraction(70), "integer", unit=Unit("cm", 2))
    assert read_number("70 clips, altogether") == Number(Fraction(70), "integer", unit=Unit("", 1))
    assert judge("70 cm", "70 m", MATH) == "wrong"
    assert judge("700 mm", "70 cm", MATH) == "undecided"
    assert judge("70 clips", "70 apples", MATH) == "right"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("(1,2]", Bracket),
        ("x < 3", Bracket),
        ("1,2", Listing),
        ("\\pm 2", Listing),
        ("x = 5", Equation),
        ("x^2+y^2=1", Equation),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", Matrix),
        ("\\text{even}", Text),
        ("10:30", Text),
        ("52_8", Text),
        ("2\\pi", Formula),
    ],
)
def test_forms(text: str, kind: type) -> None:
    assert isinstance(read_form(text), kind)


def test_where_an_answer_stands_in_prose() -> None:
    def found(text: str) -> object:
        form = read_final(text)
        return form.value if isinstance(form, Number) else form

    assert found("5 + 7 = 12, so the answer is 12. I hope it is correct.") == 12
    assert found("She sells 9 eggs at $2 each.\nShe makes $18 every day.") == 18
    assert found("We add 3 and 4.\nThe total is 7 apples.") == 7
    assert isinstance(found("There are 12 apples and 7 pears."), Listing)
    assert found("Of 12 pieces of fruit 7 were pears.") is None
    assert found("So we get $x^2+1$.") == Formula("x^2+1")
    assert found("The answer isn't 12.") is None
    assert found("\\boxed{3} is wrong, it is \\boxed{4}") == 4


@settings(deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_whole_numbers_are_equal_exactly_when_they_are(left: int, right: int) -> None:
    assert verify(f"{left:,}.00", str(left), MATH)
    assert verify(str(left), str(right), MATH) == (left == right)


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_equal_exactly_when_they_are(left: Fraction, right: Fraction) -> None:
    written = f"\\frac{{{left.numerator * 3}}}{{{left.denominator * 3}}}"
    assert verify(written, f"{left.numerator}/{left.denominator}", MATH)
    assert verify(written, f"{right.numerator}/{right.denominator}", MATH) == (left == right)
    whole, rest = divmod(abs(left), 1)
    if rest:
        assert verify(f"{'-' if left < 0 else ''}{whole} {rest}", str(left), MATH)


PIECES = st.sampled_from(
    [*"12xyie+-/*^=<, ()[]{}$%.?!&_#\n…²½", "10", "3.5", "^2", "\\le ", "\\{", "\\}", "\\frac", "\\sqrt", "\\pi", "\\text{ cm}", "\\pm "]
) | st.sampled_from(
    ["\\boxed{", "and", "is", "the answer is ", "\\cup ", "\\infty", "\\begin{pmatrix}", "\\\\", "\\end{pmatrix}", "\\in ", "\\left("]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=12).map("".join))
def test_any_text_has_a_verdict_that_is_the_same_from_either_side(left: str, right: str) -> None:
    found = judge(left, right, MATH)
    assert found in ("right", "wrong", "undecided")
    if left.strip() and right.strip():
        assert judge(right, left, MATH) == found
        assert judge(left, left, MATH) == "right"


@pytest.mark.parametrize(
    "unit", ["(", "[", "{", "a ", "5 ", "1,", "\\(", "$", ".", "the answer is 5. ", "\\boxed{", "\\text{", "-", "=", "and ", "aa,"]
)
@pytest.mark.parametrize("size", [MAX_CHARACTERS - 100, 100_000])
def test_long_and_deep_texts_have_a_verdict(unit: str, size: int) -> None:
    assert judge(unit * (size // len(unit)), "17", MATH) != "right"


def test_plain_numbers_take_a_third_of_a_hundredth_of_a_cpu_second() -> None:
    started = time.process_time()
    assert all(verify(f"so it is\n#### {i:07,}", str(i), GSM8K) for i in range(5_000))
    assert time.process_time() - started < 5_000 / 300
