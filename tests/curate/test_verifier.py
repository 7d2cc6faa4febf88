import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.curate import final_answer, symbolic, verify
from kd_core.curate.symbolic_child import readings
from kd_core.errors import KDError
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
    assert verify("#### 16", "16", GSM8K)
    assert not verify("16", "16", GSM8K)
    assert not verify("####", "16", GSM8K)


def test_exact_is_equal_text_after_trimming() -> None:
    assert verify(" ok\n", "ok", EXACT)
    assert not verify("016", "16", EXACT)
    assert not verify("OK", "ok", EXACT)


EQUAL = [
    ("016", "16"), ("1,080", "1080"), ("1080", "1,080"), ("3.50", "3.5"), ("$18", "18"), ("\\$18.00", "18"), ("-$5", "-5"),
    ("$-5", "-5"), ("+5", "5"), ("-0", "0"), (".5", "0.5"), ("16.", "16"), ("50%", "50"), ("50\\%", "50"), ("50%", "0.5"),
    ("0.5", "50%"), ("1,234,567.80", "1234567.8"), ("€16", "16"), ("0.1", "0.10"),
]  # fmt: skip
DIFFERENT = [
    ("16", "61"), ("-16", "16"), ("1,08", "108"), ("3.5", "3.6"), ("50%", "5"), ("5%", "50%"), ("1.0000000000000000001", "1"),
    ("0.3333", "0.33333"), ("10800", "1,080"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_plain_numbers_that_are_equal(answer: str, reference: str) -> None:
    assert verify(answer, reference, MATH)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_plain_numbers_that_differ(answer: str, reference: str) -> None:
    assert not verify(answer, reference, MATH)


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_whole_numbers_are_equal_exactly_when_they_are(left: int, right: int) -> None:
    assert verify(f"{left:,}.00", str(left), MATH)
    assert verify(str(left), str(right), MATH) == (left == right)


SYMBOLIC_EQUAL = [
    ("\\frac{1}{2}", "0.5"), ("x=5", "5"), ("\\left(3,\\frac{\\pi}{2}\\right)", "(3, \\pi/2)"), ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
    ("16 apples", "16"), ("The answer is 16.", "16"), ("So we get $x^2+2x+1$", "(x+1)^2"), ("1/3", "\\frac{2}{6}"),
]  # fmt: skip
SYMBOLIC_DIFFERENT = [
    ("- 16", "16"), ("2\\frac{1}{3}", "\\frac{1}{3}"), ("\\frac{1}{2}", "\\frac{1}{3}"), ("(3,4)", "(4,3)"), ("12 16", "16"),
    ("no idea at all", "16"), ("\\frac{", "1"), ("1/0", "1"), ("nan", "1"), ("\x00\ud800", "1"), ("(" * 5000, "1"), ("{" * 20000, "1"),
    ("9" * 5000, "9"), ("line\nline\n", "16"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SYMBOLIC_EQUAL)
def test_formulas_that_are_equal(answer: str, reference: str) -> None:
    assert verify(answer, reference, MATH)


@pytest.mark.parametrize(("answer", "reference"), SYMBOLIC_DIFFERENT, ids=range(len(SYMBOLIC_DIFFERENT)))
def test_formulas_that_differ_and_garbage(answer: str, reference: str) -> None:
    assert not verify(answer, reference, MATH)


def test_a_bare_formula_is_read_whole_and_prose_is_searched() -> None:
    assert readings("2\\frac{1}{3}")[0] == "\\boxed{2\\frac{1}{3}}"
    assert readings("5 \\text{ red apples}")[0] == "\\boxed{5 \\text{ red apples}}"
    assert readings("the answer is 5") == ["the answer is 5"]
    assert readings("$5$") == ["$5$"]


def test_it_works_in_worker_threads() -> None:
    found: list[bool] = []

    def ask(i: int) -> None:
        found.append(verify(f"\\frac{{{2 * i}}}{{4}}", f"\\frac{{{i}}}{{2}}", MATH))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_what_never_ends_is_not_equal_and_the_next_question_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    verify("\\frac{3}{4}", "\\frac{9}{12}", MATH)
    monkeypatch.setattr(symbolic, "LIMIT_SECONDS", 1.0)
    started = time.monotonic()
    assert not verify("9^{9^{9^9}}", "2", MATH)
    assert time.monotonic() - started < 5.0
    monkeypatch.undo()
    assert verify("\\frac{5}{4}", "\\frac{10}{8}", MATH)


def test_a_child_that_died_costs_one_answer_and_no_error() -> None:
    assert verify("\\frac{1}{7}", "\\frac{2}{14}", MATH)
    process = symbolic._child._process
    assert process is not None
    process.kill()
    process.wait()
    verify("\\frac{1}{8}", "\\frac{2}{16}", MATH)
    assert verify("\\frac{1}{9}", "\\frac{2}{18}", MATH)


def test_a_verifier_that_cannot_start_is_an_error_never_a_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    symbolic._child.stop()
    monkeypatch.setattr(symbolic, "_PROGRAM", tmp_path / "gone.py")
    with pytest.raises(KDError, match="did not start"):
        verify("\\frac{1}{11}", "\\frac{2}{22}", MATH)
    monkeypatch.undo()
    assert verify("\\frac{1}{11}", "\\frac{2}{22}", MATH)


def test_a_hundred_thousand_plain_numbers_take_seconds() -> None:
    started = time.monotonic()
    assert all(verify(f"so it is\n#### {i:07,}", str(i), GSM8K) for i in range(100_000))
    assert time.monotonic() - started < 10.0
