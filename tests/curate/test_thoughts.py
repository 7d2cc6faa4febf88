import pytest

from kd_core.curate import final_answer, judge
from kd_core.curate.thoughts import continue_thought, is_run_on, opens_thought, without_opening, without_thought
from kd_core.recipe import Task

GSM8K = Task(template="plain", verifier="math", answer_marker="####")
WHOLE = Task(template="plain", verifier="math")
AFTER_THOUGHT = Task(template="chat", verifier="math", answer_marker="</think>")
EXACT = Task(template="plain", verifier="exact")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16", "16"),
        ("<think>5</think>16", "16"),
        ("5</think>16", "16"),
        ("<think>5</think><think>6</think>16", "16"),
        ("<think><think>5</think>16", "16"),
        ("<thinking>5</thinking>16", "16"),
        ("[THINK]5[/THINK]16", "16"),
        ("<think>16", None),
        ("16 <think>", None),
        ("<think>5</think>16<think>", None),
        ("<think>", None),
        ("", ""),
    ],
)
def test_what_is_said_stands_after_the_last_thought(text: str, said: str | None) -> None:
    assert without_thought(text) == said


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<think>maybe #### 16 but wait", "wrong"),
        ("<think>first #### 16, no</think>\nI cannot say.", "wrong"),
        ("<think>#### 5</think>\n#### 16", "right"),
        ("so #### 5</think>\n#### 16", "right"),
        ("#### 16\n<think>#### 16", "wrong"),
    ],
)
def test_a_marker_in_a_thought_is_no_answer(text: str, verdict: str) -> None:
    assert judge(text, "16", GSM8K) == verdict


def test_a_box_in_a_thought_is_no_answer() -> None:
    assert judge("<think>\\boxed{16}", "16", WHOLE) == "wrong"
    assert judge("<think>\\boxed{5}</think>\\boxed{16}", "16", WHOLE) == "right"
    assert judge("<think>\\boxed{16}</think>\\boxed{5}", "16", WHOLE) == "wrong"


def test_an_exact_answer_is_what_was_said() -> None:
    assert judge("<think>hm</think> ok", "ok", EXACT) == "right"
    assert judge("<think> ok", "ok", EXACT) == "wrong"


def test_a_marker_that_ends_the_thought_asks_for_one() -> None:
    assert final_answer("<think>a</think> \\boxed{4}", AFTER_THOUGHT) == "\\boxed{4}"
    assert final_answer("\\boxed{4}", AFTER_THOUGHT) is None
    assert final_answer("<think>\\boxed{4}", AFTER_THOUGHT) is None
    assert judge("<think>5</think>So it is \\boxed{4}.", "4", AFTER_THOUGHT) == "right"


@pytest.mark.parametrize("label", ["Question:", "Q:", "Problem 2:", "**Question:**", "### Problem:", "Human:", "<|im_start|>user"])
@pytest.mark.parametrize("reference", ["42", "17"])
def test_a_second_question_is_not_answered_right(label: str, reference: str) -> None:
    text = f"6*7=42\n#### 42\n\n{label} 9+8\nAnswer: 9+8=17\n#### 17"
    assert is_run_on(text, GSM8K)
    assert judge(text, reference, GSM8K) == "wrong"


def test_a_second_question_without_its_answer_or_label_is_found_too() -> None:
    assert is_run_on("#### 42\n\nQuestion: 9+8", GSM8K)
    assert is_run_on("#### 42\n\nTom has 9 pens and buys 8. How many has he?\n#### 17", GSM8K)
    assert is_run_on("So \\boxed{42}.\n\nProblem: 9+8\nIt is \\boxed{17}.", WHOLE)


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("#### 42", GSM8K),
        ("Question: 6*7?\n6*7=42\n#### 42", GSM8K),
        ("a #### 41\n#### 42", GSM8K),
        ("#### 41\nNo, 6*7 is 42.\n#### 42", GSM8K),
        ("First \\boxed{41}, corrected: \\boxed{42}", WHOLE),
        ("<think>#### 1\nQuestion: why?\n#### 2</think>#### 42", GSM8K),
    ],
)
def test_one_answer_that_is_corrected_does_not_run_on(text: str, task: Task) -> None:
    assert not is_run_on(text, task)
    assert judge(text, "42", task) == "right"


def test_a_thought_that_the_prompt_opens_is_open_once() -> None:
    assert opens_thought("<|assistant|>\n<think>\n")
    assert not opens_thought("<think></think>\n")
    assert not opens_thought("say <think> first")
    assert without_opening("<think>\n2+2</think>4", opened=True) == "2+2</think>4"
    assert without_opening("<think>\n2+2</think>4", opened=False) == "<think>\n2+2</think>4"
    assert without_opening("4", opened=True) == "4"
    assert continue_thought("2+2</think>4", opened=True) == "<think>2+2</think>4"
    assert continue_thought("2+2</think>4", opened=False) == "2+2</think>4"
    assert continue_thought("<think>2+2</think>4", opened=True) == "<think>2+2</think>4"
    assert judge(continue_thought("maybe #### 16", opened=True), "16", GSM8K) == "wrong"
