import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kd_core.errors import SourceError
from kd_core.prompts import PROMPT_SCHEMA, PromptSet, collect_gold, collect_prompts
from kd_core.prompts.cleaning import normalise, prompt_id, side_of
from kd_core.prompts.turns import Turn, prompt_text, user_words
from kd_core.recipe import Recipe, S3Options, Split, Task

LONG = "in a far village thirteen old bakers bake {n} loaves of dark bread on each cold morning before anyone is awake there"
SPLIT = {"validation": 0.1, "test": 0.2}
TASK = {"template": "plain", "answer_marker": "#", "verifier": "math"}


def write(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": "file", "path": str(path), "prompt": "{q}", "gold": "{a}"}


def recipe(sources: list[dict[str, Any]], suites: list[dict[str, Any]], **prompts: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "seeds": [1],
            "task": TASK,
            "prompts": {"sources": sources, "split": SPLIT, **prompts},
            "teacher": {"kind": "server", "model": "m", "revision": "1"},
            "answers": {"num_samples": 1, "temperature": 1.0, "max_tokens": 8},
            "soft_labels": None,
            "student": {"kind": "pretrained", "model": "m"},
            "objective": {"supervision": "hard"},
            "training": {"steps": 2, "batch_rows": 1, "learning_rate": 0.1},
            "evaluation": {"suites": suites, "generate": None, "compare": []},
            "gate": {"rules": [{"kind": "ceiling", "metric": "bytes", "maximum": 1.0}]},
            "publish": "test",
        }
    )


HELD_OUT = {"kind": "held_out", "name": "mine"}


def rows_of(num: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"q": f"{i}+{i}=", "a": f"{i}+{i}={2 * i}#{2 * i}"} for i in range(start, start + num)]


def dropped(found: PromptSet) -> int:
    return sum(num for name, num in found.counts.items() if name in ("empty", "too_long", "duplicate") or name.startswith("overlap."))


def test_rows_are_cleaned_counted_and_sorted(tmp_path: Path) -> None:
    odd = [
        {"q": "  ", "a": "1"},
        {"q": None, "a": "#1"},
        {"q": "x" * 101, "a": "#1"},
        {"q": " 1+1=\r\n", "a": "other#0"},
        {"q": "no gold", "a": None},
    ]
    sources = [write(tmp_path / "first.jsonl", rows_of(200)), write(tmp_path / "second.jsonl", [*odd, *rows_of(50, start=180)])]
    found = collect_prompts(recipe(sources, [HELD_OUT], max_characters=100))
    table, counts = found.table, found.counts
    assert table.schema == PROMPT_SCHEMA == found.suites["mine"].schema
    assert (counts["read"], counts["empty"], counts["too_long"], counts["duplicate"]) == (255, 2, 1, 21)
    assert counts["read"] == dropped(found) + counts["train"] + counts["validation"] + counts["test"]
    assert table.num_rows == 231
    assert table["prompt_id"].to_pylist() == sorted(table["prompt_id"].to_pylist())
    rows = {row["prompt"]: row for row in table.to_pylist()}
    assert rows["1+1="] | {"split": "?"} == {
        "prompt_id": prompt_id("1+1="),
        "prompt": "1+1=",
        "gold": "1+1=2#2",
        "reference": "2",
        "split": "?",
        "source": "file:first.jsonl",
    }
    assert rows["225+225="]["source"] == "file:second.jsonl"
    assert (rows["no gold"]["gold"], rows["no gold"]["reference"]) == (None, None)
    for row in rows.values():
        assert row["split"] == side_of(normalise(row["prompt"]), Split(**SPLIT))
    assert counts["train"] == sum(row["split"] == "train" for row in rows.values())


def test_the_held_out_suite_is_the_test_side_in_order_and_cut(tmp_path: Path) -> None:
    rows = [*rows_of(100), *({"q": f"open {i}", "a": None} for i in range(100))]
    source = write(tmp_path / "x.jsonl", rows)
    found = collect_prompts(recipe([source], [HELD_OUT, HELD_OUT | {"name": "short", "limit": 3}]))
    everything = [row for row in found.table.to_pylist() if row["split"] == "test"]
    expected = [row for row in everything if row["gold"]]
    assert found.suites["mine"].to_pylist() == expected
    assert found.suites["short"].to_pylist() == expected[:3]
    assert found.counts["no_answer.mine"] == len(everything) - len(expected) > 0
    assert (found.counts["suite.mine"], found.counts["suite.short"]) == (len(expected), 3)


def test_planted_benchmark_items_are_removed_and_counted_for_the_first_suite(tmp_path: Path) -> None:
    bench = write(tmp_path / "bench.jsonl", [{"q": LONG.format(n=7), "a": "#7"}, {"q": "5+5=", "a": "#10"}, {"q": "5+5= ", "a": "#10"}])
    other = write(tmp_path / "other.jsonl", [{"q": "6+6=", "a": "#12"}, {"q": "5+5=", "a": "#10"}, {"q": "unasked", "a": None}])
    planted = [{"q": "Once more: " + LONG.format(n=7).upper(), "a": "#7"}, {"q": LONG.format(n=7).replace("dark", "white"), "a": "#7"}]
    other_numbers = {"q": LONG.format(n=8), "a": "#8"}
    train = write(tmp_path / "train.jsonl", [*rows_of(300), *planted, other_numbers])
    suites = [{"kind": "source", "name": "bench", "source": bench, "limit": 1}, {"kind": "source", "name": "other", "source": other}]
    split = {"validation": 0.1, "test": 0.0}
    found = collect_prompts(recipe([train], suites, split=split))
    kept = set(found.table["prompt"].to_pylist())
    gone = {row["q"] for row in [*rows_of(300), *planted, other_numbers]} - kept
    assert gone == {"5+5=", "6+6=", planted[0]["q"], planted[1]["q"]}
    assert (found.counts["overlap.bench"], found.counts["overlap.other"]) == (3, 1)
    assert (found.counts["near.bench"], found.counts["near.other"]) == (2, 0)
    assert found.counts["read"] == dropped(found) + found.counts["train"] + found.counts["validation"]
    assert found.suites["bench"].num_rows == 1
    assert found.suites["other"]["prompt"].to_pylist() == sorted(["6+6=", "5+5="], key=prompt_id)
    assert (found.counts["duplicate.bench"], found.counts["no_answer.other"]) == (1, 1)
    assert set(found.suites["other"]["split"].to_pylist()) == {"test"}


def test_the_same_prompt_stays_on_its_side_in_another_source_and_order(tmp_path: Path) -> None:
    one = collect_prompts(recipe([write(tmp_path / "a.jsonl", rows_of(100))], [HELD_OUT])).table
    two = collect_prompts(recipe([write(tmp_path / "b.jsonl", rows_of(200, start=-50)[::-1])], [HELD_OUT])).table
    sides = dict(zip(two["prompt_id"].to_pylist(), two["split"].to_pylist(), strict=True))
    assert [sides[key] for key in one["prompt_id"].to_pylist()] == one["split"].to_pylist()


def test_near_copies_are_on_one_side_and_a_new_row_moves_only_its_own_copies(tmp_path: Path) -> None:
    texts = [LONG.format(n=n).replace("bakers", f"{trade} bakers") for n in range(200) for trade in ("", "tired", "happy")]
    before = collect_prompts(recipe([write(tmp_path / "a.jsonl", [{"q": text, "a": "#1"} for text in texts])], [HELD_OUT]))
    sides = {row["prompt"]: row["split"] for row in before.table.to_pylist()}
    assert len(sides) == 600 == sum(before.counts[side] for side in ("train", "validation", "test"))
    assert all(len({sides[text] for text in texts[i : i + 3]}) == 1 for i in range(0, 600, 3))
    assert before.counts["regrouped"] > 100
    assert 0.1 < before.counts["test"] / 600 < 0.3
    copy = LONG.format(n=50).replace("bakers", "busy bakers")
    after = collect_prompts(recipe([write(tmp_path / "b.jsonl", [{"q": text, "a": "#1"} for text in [copy, *texts]])], [HELD_OUT]))
    moved = {row["prompt"] for row in after.table.to_pylist() if sides.get(row["prompt"], row["split"]) != row["split"]}
    assert moved in (set(), set(texts[150:153]))


def test_a_held_out_item_inside_a_training_prompt_is_taken_out(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"q": " ".join(f"word{rng.choice('bcdfg')}{rng.choice('aeiou')}{rng.choice('klmn')}" for _ in range(30)), "a": "#1"}
        for _ in range(60)
    ]
    shots = [{"q": f"Example {n}: {row['q']} Answer {n}. Now for {n + 1000}?", "a": "#1"} for n, row in enumerate(rows)]
    found = collect_prompts(recipe([write(tmp_path / "b.jsonl", [*rows, *shots])], [HELD_OUT]))
    side = {row["prompt"]: row["split"] for row in found.table.to_pylist()}
    pairs = [(side.get(row["q"]), side.get(shot["q"])) for row, shot in zip(rows, shots, strict=True)]
    assert all(None in pair or pair[0] == pair[1] for pair in pairs)
    assert found.counts["overlap.test_side"] == found.counts["near.test_side"] > 5
    assert found.counts["overlap.validation_side"] > 0
    assert found.counts["read"] == dropped(found) + found.table.num_rows


def test_a_stated_reference_wins_and_stays_text(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"q": f"{i}", "a": "so #1,080", "r": " 1,080 "} for i in range(30)])
    derived = collect_prompts(recipe([source], [HELD_OUT])).table
    stated = collect_prompts(recipe([source | {"gold": None, "reference": "{r}"}], [HELD_OUT])).table
    assert set(derived["reference"].to_pylist()) == set(stated["reference"].to_pylist()) == {"1,080"}
    assert set(stated["gold"].to_pylist()) == {None}


def test_a_marker_that_no_gold_answer_holds_is_an_error_not_an_empty_run(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"q": f"{i}", "a": f"it is {i}"} for i in range(30)])
    with pytest.raises(SourceError, match=r"prompts\.sources\.0: no gold answer holds task\.answer_marker '#'; .*'it is 29'"):
        collect_prompts(recipe([source], [HELD_OUT]))
    some = write(tmp_path / "y.jsonl", [*rows_of(30), {"q": "unmarked", "a": "it is 3"}])
    rows = {row["prompt"]: row for row in collect_prompts(recipe([some], [HELD_OUT])).table.to_pylist()}
    assert (rows["unmarked"]["gold"], rows["unmarked"]["reference"]) == ("it is 3", None)


def test_nothing_left_and_empty_suites_are_errors(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", rows_of(30))
    everything = {"kind": "source", "name": "same", "source": source}
    with pytest.raises(SourceError, match=r"no training prompt is left: read 30, .*overlap\.same 2"):
        collect_prompts(recipe([source], [HELD_OUT, everything]))
    unanswered = write(tmp_path / "y.jsonl", [{"q": "q", "a": None}])
    with pytest.raises(SourceError, match=r"evaluation\.suites\.1: suite open has no item with a gold answer or a reference, of 1 read"):
        collect_prompts(recipe([source], [HELD_OUT, {"kind": "source", "name": "open", "source": unanswered}]))


def test_half_a_utf16_pair_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [*rows_of(2), {"q": "\ud800", "a": "#1"}])
    with pytest.raises(SourceError, match=r"x\.jsonl:3: half of a UTF-16 pair"):
        collect_prompts(recipe([source], [HELD_OUT]))


def test_gold_for_a_teacher_is_the_train_side_only_and_off_every_benchmark(tmp_path: Path) -> None:
    bench = write(tmp_path / "bench.jsonl", rows_of(40))
    no_gold_first = [{"q": "100+100=", "a": None}, {"q": "y" * 200, "a": "#1"}]
    teacher = recipe([write(tmp_path / "x.jsonl", [*no_gold_first, *rows_of(200), *rows_of(10)])], [HELD_OUT]).prompts.sources
    suites = recipe([bench], [HELD_OUT, {"kind": "source", "name": "bench", "source": bench}]).evaluation.suites
    table, counts = collect_gold(
        teacher, task=Task.model_validate(TASK), split=Split(**SPLIT), suites=suites, max_characters=100, s3=S3Options()
    )
    expected = {row["q"] for row in rows_of(160, start=40) if side_of(row["q"], Split(**SPLIT)) == "train"}
    assert set(table["prompt"].to_pylist()) == expected
    assert "100+100=" in expected
    assert table.schema == PROMPT_SCHEMA
    assert table.equals(pa.Table.from_pylist(sorted(table.to_pylist(), key=lambda row: row["prompt_id"]), schema=PROMPT_SCHEMA))
    assert (counts["read"], counts["no_gold"], counts["too_long"], counts["duplicate"]) == (212, 1, 1, 10)
    assert counts["train"] == table.num_rows
    assert counts["read"] == sum(num for name, num in counts.items() if name != "read")
    with pytest.raises(SourceError, match=r"teacher\.sources: no gold row is left"):
        collect_gold(teacher, task=Task.model_validate(TASK), split=Split(**SPLIT), suites=(), max_characters=1, s3=S3Options())


# ------------------------------------------------------------------------------------------- chats


def chat(path: Path, chats: list[list[str]], *, system: str | None = None) -> dict[str, Any]:
    """A file of chats, each its turns by turns of user and assistant."""
    first = [] if system is None else [{"role": "system", "content": system}]
    rows = [[*first, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns))] for turns in chats]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return {"kind": "file", "path": str(path), "messages": "messages"}


def chat_recipe(*sources: dict[str, Any], template: str = "chat", suites: list[dict[str, Any]] | None = None) -> Recipe:
    data = recipe(list(sources), suites or [HELD_OUT]).model_dump(mode="json")
    return Recipe.model_validate({**data, "task": {"template": template, "verifier": "exact"}})


def test_chats_become_prompts_with_the_last_answer_as_gold(tmp_path: Path) -> None:
    single = [[f"What is {i}+{i}?", f"{2 * i}"] for i in range(100)]
    several = [[f"Name {i}.", f"{i}", "And the next?", f"{i + 1}"] for i in range(100)]
    open_ended = [["Hello?", "Hi.", "Bye."], ["  ", "What?"], [" What is 3+3? ", "6"]]
    found = collect_prompts(chat_recipe(chat(tmp_path / "x.jsonl", [*single, *several, *open_ended])))
    rows = {row["prompt"]: row for row in found.table.to_pylist()}
    assert (rows["What is 7+7?"]["gold"], rows["What is 7+7?"]["reference"]) == ("14", "14")
    text = prompt_text([Turn("user", "Name 5."), Turn("assistant", "5"), Turn("user", "And the next?")])
    assert rows[text]["gold"] == "6"
    assert rows[prompt_text([Turn("user", "Hello?"), Turn("assistant", "Hi."), Turn("user", "Bye.")])]["gold"] is None
    assert (found.counts["read"], found.counts["empty"], found.counts["duplicate"]) == (203, 1, 1)
    assert found.counts["read"] == dropped(found) + sum(found.counts[side] for side in ("train", "validation", "test"))


def test_a_single_user_turn_is_the_same_prompt_as_a_text(tmp_path: Path) -> None:
    texts = write(tmp_path / "a.jsonl", [{"q": f"What is {i}+{i}?", "a": f"{2 * i}"} for i in range(50)])
    chats = chat(tmp_path / "b.jsonl", [[f"what is {i}+{i}?", f"{2 * i}"] for i in range(50)])
    assert collect_prompts(chat_recipe(texts, chats)).counts["duplicate"] == 50
    plain = collect_prompts(chat_recipe(chats, template="plain"))
    assert plain.table.num_rows == 50


def test_chats_with_the_same_user_words_are_on_one_side_and_off_a_benchmark_that_has_them(tmp_path: Path) -> None:
    asked = [[LONG.format(n=n), "Go on.", "How many loaves?", f"{n}"] for n in range(120)]
    brief, kind = (chat(tmp_path / f"{name}.jsonl", asked, system=f"Be {name}.") for name in ("brief", "kind"))
    found = collect_prompts(chat_recipe(brief, kind))
    assert (found.table.num_rows, found.counts["duplicate"]) == (240, 0)
    sides: dict[str, set[str]] = {}
    for row in found.table.to_pylist():
        sides.setdefault(user_words(row["prompt"]), set()).add(row["split"])
    assert set(map(len, sides.values())) == {1}
    bench = chat(tmp_path / "bench.jsonl", asked[:5], system="Be exact.")
    suites = [HELD_OUT, {"kind": "source", "name": "bench", "source": bench}]
    left = collect_prompts(chat_recipe(brief, suites=suites))
    assert left.counts["overlap.bench"] + left.counts["test"] + left.counts["validation"] + left.counts["train"] == 120
    planted = {user_words(row) for row in left.suites["bench"]["prompt"].to_pylist()}
    assert not planted & {user_words(row["prompt"]) for row in left.table.to_pylist() if row["split"] != "test"}


def test_a_plain_template_refuses_several_turns_by_file_and_line(tmp_path: Path) -> None:
    source = chat(tmp_path / "x.jsonl", [["a", "b"], ["a", "b", "c", "d"]])
    with pytest.raises(SourceError, match=r"x\.jsonl:2: a prompt of 3 turns \(user, assistant, user\) needs .*task\.template: chat"):
        collect_prompts(chat_recipe(source, template="plain"))
