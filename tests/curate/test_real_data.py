"""GSM8K, SVAMP and MATH-500, from the directory that KD_TEST_DATA names."""

import json
import os
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kd_core.curate import curate_answers, verify
from kd_core.prompts import collect_gold
from kd_core.recipe import Curate, FileSource, S3Options, SourceSuite, Split, Task

pytestmark = pytest.mark.skipif("KD_TEST_DATA" not in os.environ, reason="KD_TEST_DATA names no directory of real data")

GSM8K = Task(template="plain", verifier="math", answer_marker="####")
WHOLE = Task(template="plain", verifier="math")
MATH500_EQUAL = {
    ("-2,1", "1,-2"),
    ("10,\\!080", "10080"),
    ("120", "120^\\circ"),
    ("15", "15\\mbox{ cm}^2"),
    ("2 \\sqrt{5}", "2\\sqrt{5}"),
    ("30", "30^\\circ"),
    ("36", "36^\\circ"),
    ("36", "\\$36"),
    ("5", "x=5"),
    ("90", "90^\\circ"),
    ("\\frac14", "\\frac{1}{4}"),
}
"""All pairs of different texts among the answers of MATH-500 that say the same, looked through by a person."""
NOTHING_HELD_OUT = Split(validation=0.0, test=0.0)


def data(name: str) -> Path:
    return Path(os.environ["KD_TEST_DATA"]) / name


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k_source(path: Path) -> FileSource:
    return FileSource(kind="file", path=str(path), prompt="{question}", gold="{answer}")


def collect(source: FileSource, suites: tuple[SourceSuite, ...] = ()) -> tuple[pa.Table, dict[str, int]]:
    return collect_gold([source], task=GSM8K, split=NOTHING_HELD_OUT, suites=suites, max_characters=20_000, s3=S3Options())


@pytest.mark.parametrize(("name", "num"), [("train", 7473), ("test", 1319)])
def test_gsm8k_gold_answers_are_right_and_shifted_ones_are_not(name: str, num: int) -> None:
    table, counts = collect(gsm8k_source(data(f"gsm8k/{name}.jsonl")))
    assert counts["read"] == num == table.num_rows + counts["duplicate"]
    answers = table.select(["prompt_id"]).append_column("key", table["prompt_id"]).append_column("text", table["gold"])
    answers = answers.append_column("sample_index", pa.array([0] * table.num_rows, pa.int32()))
    answers = answers.append_column("finish_reason", pa.array(["stop"] * table.num_rows))
    assert curate_answers(answers, table, curate=Curate(), task=GSM8K).counts["kept"] == table.num_rows
    shifted = answers.set_column(2, "text", pa.array([*table["gold"].to_pylist()[1:], "#### none"]))
    assert curate_answers(shifted, table, curate=Curate(), task=GSM8K).counts["wrong"] > 0.95 * table.num_rows


def test_planted_gsm8k_test_questions_are_found(tmp_path: Path) -> None:
    train, test = lines(data("gsm8k/train.jsonl"))[:2000], lines(data("gsm8k/test.jsonl"))
    suite = SourceSuite(kind="source", name="gsm8k-test", source=gsm8k_source(data("gsm8k/test.jsonl")), limit=10)
    path = tmp_path / "train.jsonl"

    def left(rows: list[dict[str, Any]]) -> set[str]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return set(collect(gsm8k_source(path), (suite,))[0]["prompt"].to_pylist())

    honest = left(train)
    assert len(honest) > 0.98 * len(train)
    copies = [row | {"question": row["question"].upper().replace(" ", "  ")} for row in test]
    assert left([*train, *copies]) == honest
    inside = [row | {"question": f"Solve this: {row['question']} Explain."} for row in test if len(row["question"].split()) >= 16]
    assert len(inside) > 1200
    assert left([*train, *inside]) == honest


def test_svamp_reads_two_columns_and_its_decimal_answers_verify() -> None:
    source = FileSource(
        kind="file", path=str(data("svamp/SVAMP.json")), prompt="{Body} {Question}", gold="{Equation}", reference="{Answer}"
    )
    table, counts = collect(source)
    assert (counts["read"], counts["read"] - counts["duplicate"]) == (1000, table.num_rows)
    references = table["reference"].to_pylist()
    assert all(verify(f"#### {float(reference):.0f}", reference, GSM8K) for reference in references)
    assert all(verify(f"So it is {float(reference):,.2f} in all.", reference, WHOLE) for reference in references)
    pairs = [(one, other) for one, other in pairwise(references) if float(one) != float(other)]
    assert len(pairs) > 900
    assert not any(verify(f"#### {one}", other, GSM8K) for one, other in pairs)


def test_math500_solutions_verify_against_their_answers_and_not_against_the_next() -> None:
    rows = lines(data("math500/test.jsonl"))
    assert len(rows) == 500
    assert sum(verify(row["solution"], row["answer"], WHOLE) for row in rows) >= 499
    by_next = {(one["answer"], other["answer"]) for one, other in pairwise(rows) if verify(one["answer"], other["answer"], WHOLE)}
    assert {pair for pair in by_next if pair[0] != pair[1]} == {("5", "x=5")}


@pytest.mark.drill
@pytest.mark.slow
def test_of_all_pairs_of_math500_answers_only_these_are_equal() -> None:
    answers = sorted({row["answer"] for row in lines(data("math500/test.jsonl"))})
    found = {(one, other) for one, other in combinations(answers, 2) if verify(one, other, WHOLE)}
    assert found == MATH500_EQUAL
    assert not any(verify(other, one, WHOLE) != ((one, other) in found) for one, other in combinations(answers[::4], 2))
