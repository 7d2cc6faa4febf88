"""What counts as a copy of a held-out item, and what does not: by hand, and planted on real benchmarks."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_core.prompts import collect_prompts
from kd_core.prompts.decontaminate import SuiteIndex, Wording, groups, index_suite, overlap, set_aside_common, wording
from kd_core.prompts.words import figures_of, spelled, words_of
from kd_core.recipe.files import load_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
LONG = " ".join(WORDS)


def found(item: str, prompt: str) -> str | None:
    return overlap(index_suite([wording(item)]), wording(prompt))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How many apples?", "how many APPLES"),
        ("How many apples?", "How\u00a0many\u2009app\u200bles ?"),
        ("It costs $1,000, now.", "It costs 1000 now"),
        ("The numbers:1,234,567 and 89.", "the numbers 1234567 and 89"),
        ("It costs \\$1{,}000 now.", "It costs 1\u202f000 now"),
        ("It costs $5.00, or 2.50 each", "It costs 5 or 2.5 each"),
        ("Five people don't eat", "5 people don\u2019t eat"),
        ("What is $\\frac{1}{2} \\cdot x^{2}$?", "What is \\(\\dfrac12\\times x^2\\)?"),
        ("What is 1/2 of x\u00b2", "What is \u00bd of $x^2$"),
        ("$\\left(3 + x\\right) \\le 5$", "(3+x) <= 5"),
        ("**Question**: a well-known rule (in short)", "Question: a well known rule in short"),
        ("7 + 5 =", "7+5=?"),
        ("7 \u2212 5 =", "7-5="),
        ("\uff28ow \uff11\uff12?", "how 12"),
        ("小明有三个苹果。", "小明有三个苹果"),
    ],
)
def test_spelling_hides_no_copy(one: str, other: str) -> None:
    assert words_of(one) == words_of(other)
    assert found(one, other) == "same"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7+5=", "7-5="),
        ("(3+4)*5=", "3+(4*5)="),
        ("75=", "7+5="),
        ("What is 1.5?", "What is 15?"),
        ("It is -3 now", "It is 3 now"),
        ("What is 5!?", "What is 5?"),
        ("f(1, 234)", "f(1234)"),
        ("f(1,2,345)", "f(1,2345)"),
        ("x^2", "x2"),
        ("\u0915\u093f", "\u0915\u093e"),  # two words of Hindi that differ in a mark
        ("???", "!!!"),
        ("小明有三个苹果", "小明有四个苹果"),
    ],
)
def test_what_tells_two_problems_apart_stays(one: str, other: str) -> None:
    assert words_of(one) != words_of(other)
    assert spelled(words_of(one)) != spelled(words_of(other))
    assert found(one, other) is None


def test_no_text_takes_long_to_compare() -> None:
    """Each is 20,000 characters, of which no expression may try all pairs of places; the time-out of a test is the bound."""
    for piece in ("111,", "(", "*a ", "**a ", "\\frac{", "\\frac{a}{", "-", "$", "'", "1.", "[a ", "_a", "a\u0300", "\u200b", "1"):
        assert wording(piece * (20_000 // len(piece))).spelling


def test_figures_are_numbers_operators_and_amounts() -> None:
    assert figures_of(words_of("Twelve eggs cost $3.50; twice 12 + half")) == ("+", "12", "12", "3.5", "half", "twice")


def changed(num: int, text: str = LONG) -> str:
    """Words changed in every fourteenth place, as many as asked for."""
    words = text.split()
    for i in range(num):
        words[7 + 14 * i] = f"other{chr(97 + i)}"
    return " ".join(words)


def test_a_long_prompt_is_near_until_two_fifths_of_its_runs_are_gone() -> None:
    assert [found(LONG, changed(num)) for num in range(5)] == ["same", "near", "near", "near", "near"]  # 36 of 56 runs are left
    words = changed(4).split()
    words[2], words[57] = "otherx", "othery"
    assert found(LONG, " ".join(words)) is None


def test_other_figures_are_another_problem() -> None:
    item = " ".join([*WORDS[:30], "7", *WORDS[30:]])
    assert found(item, item.replace(WORDS[2], "else")) == "near"
    assert found(item, item.replace(" 7 ", " 8 ")) is None
    assert found(item, item.replace(WORDS[2], "twice")) == "near", "what an item lacks may stand in a longer prompt"
    assert groups([wording(item), wording(item.replace(" 7 ", " 8 ")), wording(item.replace(WORDS[2], "else"))]) == [0, 1, 0]


def test_an_item_inside_a_longer_prompt_is_found_from_thirteen_words_on() -> None:
    around = "Here is an example 12 + 3 : {} and its answer is left to you , so go on".format
    assert found(" ".join(WORDS[:13]), around(" ".join(WORDS[:13]))) == "near"
    assert found(" ".join(WORDS[:12]), around(" ".join(WORDS[:12]))) is None
    assert found(" ".join(WORDS[:19]), around(changed(1, " ".join(WORDS[:19])))) is None, "under 20 words all must be there"
    assert found(" ".join(WORDS[:20]), around(" ".join([*WORDS[:19], "other"]))) == "near"


def test_an_instruction_that_many_share_identifies_none_of_them() -> None:
    def prompts(instruction: str, num: int) -> list[Wording]:
        return [wording(f"{instruction} {WORDS[40 + i % 20]} {WORDS[20 + i // 20]}") for i in range(num)]

    shared = prompts(" ".join(WORDS[:30]), 11)
    assert groups(shared) == [0] * 11
    apart = set_aside_common(shared)
    assert {len(one.runs) for one in apart} == {2}
    assert groups(apart) == list(range(11))
    assert overlap(index_suite(apart[:5]), apart[9]) is None
    assert overlap(index_suite(apart[:5]), apart[3]) == "same"
    assert groups(set_aside_common(shared[:10])) == [0] * 10, "ten copies are copies"
    others = [wording(f"{i}") for i in range(1100)]
    assert groups(set_aside_common([*shared, *others]))[:11] == [0] * 11, "under one in a hundred they are copies"


def test_a_template_of_many_figures_hides_no_copy_and_makes_none() -> None:
    texts = [" ".join([*WORDS[:20], str(i), *WORDS[20:25]]) for i in range(50)]
    copies = [text.replace(WORDS[2], "else") for text in texts]
    longer = [f"{text} and 99 + 1" for text in texts]
    found = set_aside_common([wording(text) for text in [*texts, *copies, *longer]])
    assert groups(found) == [*range(50), *range(50), *range(100, 150)]
    index = index_suite(found[:50])
    assert [overlap(index, one) for one in found[50:]] == ["near"] * 50 + [None] * 50


def test_copies_of_copies_are_one_group_whatever_the_order() -> None:
    chain = [wording(changed(num)) for num in range(4)] + [wording("alone"), wording("Alone!"), wording(" ".join(reversed(WORDS)))]
    assert groups(chain) == [0, 0, 0, 0, 4, 4, 6]
    order = random.Random(0).sample(range(7), 7)
    shuffled = groups([chain[i] for i in order])
    assert Counter(shuffled).most_common(1)[0][1] == 4
    assert groups([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_comparing_all_pairs(seed: int) -> None:
    """Twelve originals and 228 copies of copies, each with one to six words changed."""
    rng = random.Random(seed)
    texts = [rng.choices(WORDS, k=rng.randint(15, 50)) for _ in range(12)]
    while len(texts) < 240:
        copy = list(rng.choice(texts))
        for _ in range(rng.randint(1, 6)):
            copy[rng.randrange(len(copy))] = rng.choice(WORDS)
        texts.append(copy)
    wordings = [wording(" ".join(text)) for text in texts]
    expected = list(range(240))
    for i, one in enumerate(wordings):
        for j in range(i):
            if expected[i] != expected[j] and overlap(index_suite([wordings[j]]), one):
                low, high = sorted((expected[i], expected[j]))
                expected = [low if group == high else group for group in expected]
    assert groups(wordings) == expected
    assert 12 < len(set(expected)) < 200


# ------------------------------------------------------------------------------------------- real data

real = pytest.mark.skipif("KD_TEST_DATA" not in os.environ, reason="KD_TEST_DATA names no directory of real data")


def read(name: str) -> list[str]:
    folder = Path(os.environ["KD_TEST_DATA"])
    if name == "svamp":
        return [f"{row['Body']} {row['Question']}" for row in json.loads((folder / "svamp/SVAMP.json").read_text())]
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["problem"] if "problem" in row else row["question"] for row in lines]


@pytest.fixture(scope="module")
def suites() -> dict[str, tuple[list[str], SuiteIndex]]:
    texts = {name: read(name) for name in ("gsm8k/test", "svamp", "math500/test")}
    return {name: (items, index_suite([wording(item) for item in items])) for name, items in texts.items()}


TRIVIAL: list[Callable[[str], str]] = [
    str.upper,
    lambda text: text.rstrip("?.! "),
    lambda text: text.replace(" ", "\u00a0 "),
    lambda text: "\u200b".join(text.split(" ")).replace("\u200b", " \u200b"),
    lambda text: f"  {text}\n",
]


@real
def test_every_exact_and_trivially_changed_item_is_found(suites: dict[str, tuple[list[str], SuiteIndex]]) -> None:
    for name, (items, index) in suites.items():
        for number, change in enumerate(TRIVIAL):
            missed = [item for item in items[number::5] if overlap(index, wording(change(item))) != "same"]
            assert not missed, f"{name}, change {number}: {missed[:3]}"


@real
@pytest.mark.parametrize(("num_changed", "least_words"), [(1, 30), (2, 40), (3, 50)])
def test_most_items_of_which_a_few_words_are_changed_are_found(
    suites: dict[str, tuple[list[str], SuiteIndex]], num_changed: int, least_words: int
) -> None:
    rng, tried, missed = random.Random(num_changed), 0, 0
    for items, index in suites.values():
        for item in items:
            words = item.split()
            plain = [i for i, word in enumerate(words) if word.isalpha() and not figures_of(words_of(word))]
            if len(words) < least_words or len(plain) < num_changed:
                continue
            for i in rng.sample(plain, num_changed):
                words[i] = rng.choice(("window", "slowly", "between", "garden"))
            tried += 1
            missed += overlap(index, wording(" ".join(words))) is None
    assert tried > 500
    assert missed <= 0.05 * tried


@real
def test_a_question_and_itself_without_its_mark_are_on_one_side(tmp_path: Path) -> None:
    questions = read("gsm8k/test")[:500]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps({"q": text}) + "\n" for text in [*questions, *(text.rstrip("?. ") for text in questions)]))
    source = {"kind": "file", "path": str(path), "prompt": "{q}"}
    recipe = load_recipe(QUICKSTART, [f"prompts.sources=[{json.dumps(source)}]", "prompts.split={validation: 0.1, test: 0.1}"])
    table = collect_prompts(recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"suites": ()})})).table
    sides: dict[str, set[str]] = {}
    for row in table.to_pylist():
        sides.setdefault(wording(row["prompt"]).spelling, set()).add(row["split"])
    assert table.num_rows > 990
    assert len(sides) == 500
    assert all(len(side) == 1 for side in sides.values())


@real
def test_gsm8k_holds_no_copy_of_another_benchmark(suites: dict[str, tuple[list[str], SuiteIndex]]) -> None:
    train = [wording(text) for text in read("gsm8k/train")]
    copies = {name: sum(overlap(index, one) is not None for one in train) for name, (_, index) in suites.items()}
    assert copies == {"gsm8k/test": 0, "svamp": 0, "math500/test": 0}
    assert Counter(Counter(groups(train)).values()) == {1: 7471, 2: 1}
