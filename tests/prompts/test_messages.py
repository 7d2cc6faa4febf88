"""Rows of chats: both forms, what is learnt and what is the prompt, and what is refused rather than lost."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.errors import SourceError
from kd_core.prompts.messages import read_chat
from kd_core.prompts.rows import RawRow
from kd_core.prompts.sources import read_source
from kd_core.prompts.turns import Turn, messages_of, prompt_key, prompt_text, shown, turns_of, user_words
from kd_core.recipe import FileSource, S3Options, Task

CHAT = Task(template="chat", verifier="exact")
OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in OPENAI]
PROMPT = (Turn("system", "Be brief."), Turn("user", "1+1?"), Turn("assistant", "2"), Turn("user", "And 2+2?"))


def rows(path: Path, **fields: Any) -> list[RawRow]:
    source = FileSource.model_validate({"kind": "file", "path": str(path), "messages": "messages", **fields})
    return [row for _, row in read_source(source, where="prompts.sources.0", s3=S3Options())]


def read(*turns: dict[str, Any]) -> tuple[tuple[Turn, ...], str | None]:
    return read_chat(list(turns), column="messages", at="x.jsonl:7")


@pytest.mark.parametrize("form", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_both_forms_in_every_kind_of_file(tmp_path: Path, form: list[dict[str, Any]], suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps({"messages": form}) + "\n")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([{"messages": form}]), path)
    else:
        path.write_text('messages\n"' + json.dumps(form).replace('"', '""') + '"\n')
    (row,) = rows(path)
    assert (row.prompt, row.gold, row.reference) == (PROMPT, "4", None)


def test_the_last_assistant_turn_is_gold_and_only_if_it_is_last() -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert read(user, answer) == ((Turn("user", "a"),), "b")
    assert read(user, answer, user) == ((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "a")), None)
    assert read(user) == ((Turn("user", "a"),), None)
    assert read({"from": "human", "value": "a"}, {"from": "observation", "value": "b"})[0][1] == Turn("tool", "b")
    assert read() == ((), None)
    assert read_chat(None, column="messages", at="x") == ((), None)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    assert read({"role": "developer", "content": "s"}, {"role": "user", "content": parts})[0] == (Turn("system", "s"), Turn("user", "ab"))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "function", "content": "x"}, "turn 2: role 'function' is not known; there are system, developer, user, assistant, tool"),
        ({"from": "bard", "value": "x"}, "turn 2: from 'bard' is not known; there are system, human, user, gpt"),
        ({"text": "x"}, "turn 2: expected {role, content} or {from, value}, found the fields 'text'"),
        ("x", "turn 2: expected {role, content} or {from, value}, found 'x'"),
        ({"role": "assistant", "content": None}, "turn 2, content: expected text, or a list of parts of type text, found nothing"),
        ({"role": "user", "content": [{"type": "image_url", "text": None}]}, "turn 2, content: expected text"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "turn 2: it has 'tool_calls', which is not read and"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "turn 2: it has 'reasoning_content'"),
        ({"role": "assistant", "content": "x", "weight": "0"}, ": the last assistant turn has weight 0"),
        ({"role": "system", "content": "x"}, ": a chat that ends in a system message asks for nothing"),
    ],
)
def test_what_would_be_lost_is_refused_with_file_line_and_turn(turn: Any, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        read({"role": "user", "content": "a"}, turn)
    assert str(caught.value).startswith("x.jsonl:7: column 'messages'")
    assert message in str(caught.value)


def test_other_things_than_turns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": "hello"}\n')
    with pytest.raises(SourceError, match=r"x\.jsonl:1: column 'messages': expected a list of chat turns, found text that is not JSON"):
        rows(path)
    path.write_text('{"messages": {"role": "user"}}\n')
    with pytest.raises(SourceError, match=r"x\.jsonl:1: column 'messages': expected a list of chat turns .*, found a dict"):
        rows(path)
    path.write_text('{"other": 1}\n')
    with pytest.raises(SourceError, match=r"x\.jsonl:1: no column 'messages', which prompts\.sources\.0\.messages needs; .*'other'"):
        rows(path)


def test_a_source_says_prompt_or_messages() -> None:
    for fields in ({}, {"prompt": "{q}", "messages": "messages"}, {"messages": "messages", "gold": "{a}"}):
        with pytest.raises(ValueError, match=r"say either prompt|the last assistant turn of messages is the gold answer"):
            FileSource.model_validate({"kind": "file", "path": "x.jsonl", **fields})


def test_a_system_message_of_a_row_goes_before_that_of_the_task() -> None:
    task = CHAT.model_copy(update={"system": "Of the task."})
    assert [m["content"] for m in messages_of("1+1?", task)] == ["Of the task.", "1+1?"]
    assert messages_of(prompt_text(PROMPT), task) == OPENAI[:-1]
    assert messages_of("1+1?", CHAT) == [{"role": "user", "content": "1+1?"}]


TURNS = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant", "tool"]), st.text()), min_size=1, max_size=4)


@given(TURNS)
def test_turns_survive_being_kept(turns: list[Turn]) -> None:
    text = prompt_text(turns)
    assert turns_of(text) == tuple(turns)
    assert turns_of(prompt_text([Turn("user", text)])) == (Turn("user", text),), "a text that is such a list stays a text"


def test_one_user_turn_is_its_text_and_a_chat_is_shown_turn_by_turn() -> None:
    assert prompt_text([Turn("user", "1+1?")]) == "1+1?" == shown("1+1?") == user_words("1+1?")
    text = prompt_text(PROMPT)
    assert shown(text) == "system: Be brief.\n\nuser: 1+1?\n\nassistant: 2\n\nuser: And 2+2?"
    assert user_words(text) == "1+1?\nAnd 2+2?"
    assert prompt_key(prompt_text([Turn("user", " A  b")])) == "a b"
