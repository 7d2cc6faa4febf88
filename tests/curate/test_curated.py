import random
from typing import Any, get_args

import pyarrow as pa
import pytest

from kd_core.curate import Reason, curate_answers, gold_rows
from kd_core.errors import ArtifactError
from kd_core.prompts import PROMPT_SCHEMA
from kd_core.recipe import Curate, Task

TASK = Task(template="plain", verifier="math", answer_marker="#")
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "prompt_id": pa.string(),
        "sample_index": pa.int32(),
        "prompt_ids": pa.list_(pa.int32()),
        "answer_ids": pa.list_(pa.int32()),
        "text": pa.string(),
        "finish_reason": pa.string(),
    }
)


def prompts_table(rows: dict[str, str | None], **fields: Any) -> pa.Table:
    base = {"prompt": "?", "gold": None, "split": "train", "source": "file:x.jsonl"} | fields
    return pa.Table.from_pylist(
        [base | {"prompt_id": key, "reference": reference} for key, reference in rows.items()], schema=PROMPT_SCHEMA
    )


def answers_table(rows: list[tuple[str, int, str, str]]) -> pa.Table:
    names = ("prompt_id", "sample_index", "text", "finish_reason")
    return pa.Table.from_pylist(
        [dict(zip(names, row, strict=True)) | {"key": f"k{i}", "prompt_ids": [1, 2], "answer_ids": [i, 0]} for i, row in enumerate(rows)],
        schema=SCHEMA,
    )


PROMPTS = prompts_table({"a": "3", "b": None, "c": "5"})
ANSWERS = answers_table(
    [
        ("c", 1, "x#5", "stop"),
        ("a", 2, "2+1=3#3", "stop"),
        ("a", 0, "1+2=3#3", "stop"),
        ("a", 1, "1+2=3#3", "stop"),
        ("a", 3, "1+2=4#4", "stop"),
        ("a", 4, "3#3", "length"),
        ("a", 5, " \n\t", "stop"),
        ("a", 6, "", "error"),
        ("a", 7, "03#03", "stop"),
        ("b", 0, "who knows#1", "stop"),
        ("c", 0, "no marker 5", "stop"),
    ]
)


def outcome(**curate: Any) -> tuple[list[tuple[str, int]], dict[tuple[str, int], str]]:
    found = curate_answers(ANSWERS, PROMPTS, curate=Curate(**curate), task=TASK)
    kept = [(row["prompt_id"], row["sample_index"]) for row in found.kept.to_pylist()]
    rejected = {(row["prompt_id"], row["sample_index"]): row["reason"] for row in found.rejected.to_pylist()}
    assert sorted([*kept, *rejected]) == sorted((row["prompt_id"], row["sample_index"]) for row in ANSWERS.to_pylist())
    assert found.counts["read"] == ANSWERS.num_rows == found.counts["kept"] + sum(found.counts[reason] for reason in get_args(Reason))
    assert found.counts["kept"] == len(kept)
    return kept, rejected


BASE = {
    ("a", 1): "duplicate",
    ("a", 3): "wrong",
    ("a", 4): "truncated",
    ("a", 5): "empty",
    ("a", 6): "error",
    ("b", 0): "no_reference",
    ("c", 0): "wrong",
}


def test_every_reason_by_hand() -> None:
    kept, rejected = outcome()
    assert kept == [("a", 0), ("a", 2), ("a", 7), ("c", 1)]
    assert rejected == BASE


def test_the_limit_keeps_the_first_distinct_answers_of_each_prompt() -> None:
    kept, rejected = outcome(max_answers_per_prompt=2)
    assert kept == [("a", 0), ("a", 2), ("c", 1)]
    assert rejected == BASE | {("a", 7): "over_limit"}


def test_unverified_truncated_and_wrong_answers_are_kept_when_asked_for() -> None:
    assert outcome(keep_unverified=True)[1] == {key: reason for key, reason in BASE.items() if key != ("b", 0)}
    assert outcome(keep_truncated=True)[1] == {key: reason for key, reason in BASE.items() if key != ("a", 4)}
    kept, rejected = outcome(verify=False)
    assert rejected == {key: reason for key, reason in BASE.items() if reason not in ("wrong", "no_reference")}
    assert ("b", 0) in kept


def test_a_truncated_answer_is_verified_too() -> None:
    answers = answers_table([("a", 0, "4#4", "length"), ("a", 1, "3#3", "length")])
    found = curate_answers(answers, PROMPTS, curate=Curate(keep_truncated=True), task=TASK)
    assert (found.kept["sample_index"].to_pylist(), found.rejected["reason"].to_pylist()) == ([1], ["wrong"])


def test_thoughts_run_on_answers_and_what_cannot_be_read_have_reasons_of_their_own() -> None:
    answers = answers_table(
        [
            ("a", 0, "<think>3#3", "stop"),
            ("a", 1, "<think>3#3", "length"),
            ("a", 2, "3#3\n\nQuestion: 2+2?\n4#4", "stop"),
            ("a", 3, "#3 or 4", "stop"),
            ("a", 4, "#\\frac{3", "stop"),
            ("a", 5, "<think>5#5</think>3#3", "stop"),
            ("b", 0, "<think>who knows", "stop"),
        ]
    )
    found = curate_answers(answers, PROMPTS, curate=Curate(keep_truncated=True, keep_unverified=True), task=TASK)
    assert found.kept["key"].to_pylist() == ["k5"]
    assert found.rejected["reason"].to_pylist() == ["open_thought", "open_thought", "run_on", "wrong", "undecided", "open_thought"]
    assert (found.counts["undecided"], found.counts["wrong"]) == (1, 1)
    unjudged = curate_answers(answers, PROMPTS, curate=Curate(verify=False), task=TASK)
    assert unjudged.kept["key"].to_pylist() == ["k3", "k4", "k5"]


def test_a_rejected_copy_never_displaces_a_good_one() -> None:
    answers = answers_table([("a", 0, "3#3", "length"), ("a", 1, "3#3", "stop"), ("c", 0, "3#3", "stop")])
    found = curate_answers(answers, PROMPTS, curate=Curate(max_answers_per_prompt=1), task=TASK)
    assert found.kept["key"].to_pylist() == ["k1"]
    assert found.rejected["reason"].to_pylist() == ["truncated", "wrong"]


def test_kept_rows_are_whole_and_order_of_arrival_changes_nothing() -> None:
    found = curate_answers(ANSWERS, PROMPTS, curate=Curate(), task=TASK)
    assert found.kept.schema == SCHEMA
    assert found.rejected.column_names == ["key", "prompt_id", "sample_index", "text", "reason"]
    originals = {row["key"]: row for row in ANSWERS.to_pylist()}
    assert all(row == originals[row["key"]] for row in found.kept.to_pylist())
    order = list(range(ANSWERS.num_rows))
    random.Random(0).shuffle(order)
    shuffled = pa.concat_tables([ANSWERS.slice(i, 1) for i in order])
    again = curate_answers(shuffled, PROMPTS.take([2, 0, 1]), curate=Curate(), task=TASK)
    assert again.kept.equals(found.kept)
    assert again.rejected.equals(found.rejected)
    assert again.counts == found.counts


def test_no_answers_are_two_empty_tables() -> None:
    found = curate_answers(ANSWERS.slice(0, 0), PROMPTS, curate=Curate(), task=TASK)
    assert (found.kept.num_rows, found.rejected.num_rows, found.counts["read"]) == (0, 0, 0)
    assert found.kept.schema == SCHEMA


def test_what_cannot_be_joined_is_refused() -> None:
    curate = Curate()
    with pytest.raises(ArtifactError, match="1 keys stand twice"):
        curate_answers(pa.concat_tables([ANSWERS, ANSWERS.slice(0, 1)]), PROMPTS, curate=curate, task=TASK)
    with pytest.raises(ArtifactError, match=r"2 belong to none of the 2 prompts \(one says c\)"):
        curate_answers(ANSWERS, PROMPTS.slice(0, 2), curate=curate, task=TASK)
    with pytest.raises(ArtifactError, match=r"finish_reason \['cancelled'\]"):
        curate_answers(answers_table([("a", 0, "3#3", "cancelled")]), PROMPTS, curate=curate, task=TASK)


def test_gold_rows_are_the_first_training_prompts_with_gold() -> None:
    train = prompts_table({"d": "1", "b": "2", "a": "3"}, gold="g")
    others = [
        prompts_table({"0": "1"}, gold="g", split="test"),
        prompts_table({"1": "1"}, gold="g", split="validation"),
        prompts_table({"2": None}),
    ]
    prompts = pa.concat_tables([*others, train])
    assert gold_rows(prompts, limit=None)["prompt_id"].to_pylist() == ["a", "b", "d"]
    assert gold_rows(prompts, limit=2)["prompt_id"].to_pylist() == ["a", "b"]
    assert gold_rows(prompts, limit=0).num_rows == 0
    assert gold_rows(prompts, limit=9).schema == PROMPT_SCHEMA


def test_twenty_thousand_rows_take_seconds_and_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    num = 20_000
    prompts = prompts_table({f"{i:05}": str(i) for i in range(num // 4)})
    answers = answers_table([(f"{i // 4:05}", i % 4, f"{i % 2}#{i // 4 + i % 2}", "stop") for i in range(num)])
    counts = curate_answers(answers, prompts, curate=Curate(), task=TASK).counts
    assert (counts["kept"], counts["wrong"], counts["duplicate"]) == (num // 4, num // 2, num // 4)
    assert capfd.readouterr() == ("", "")
