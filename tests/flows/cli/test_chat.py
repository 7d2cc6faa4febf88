"""``kd chat``: who answers, from verified files, for scripts and for people; and who is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_core.artifacts import find, forget
from kd_core.store import LocalStore

PROMPT = "7+5="


@pytest.fixture
def there(finished: Any, kd: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``kd chat`` beside the finished run."""
    monkeypatch.chdir(finished.home)
    return lambda *words: kd("chat", *words)


def answers(called: Any) -> list[dict[str, Any]]:
    assert (called.code, called.err) == (0, ""), called.err
    found: list[dict[str, Any]] = json.loads(called.out)["answers"]
    return found


def record(done: Any, name: str) -> Any:
    node = next(node for node in done.said["nodes"] if node["name"] == name)
    return find(LocalStore(done.store), "train" if name.startswith("student") else name, node["fingerprint"])


def test_both_answer_a_prompt_as_the_recipe_asks_it(there: Callable[..., Any], finished: Any) -> None:
    found = answers(there(finished.recipe_file, "--prompt", PROMPT, "--json"))
    assert [(entry["prompt"], entry["model"]) for entry in found] == [(PROMPT, "teacher"), (PROMPT, "student (seed 0)")]
    assert all(entry["tokens"] == 20 and entry["finish_reason"] == "length" for entry in found), "as long as evaluation.generate lets it be"
    assert all(set(entry["text"]) <= set("0123456789+-=,#") for entry in found)
    [teacher] = answers(there(finished.recipe_file, "--prompt", PROMPT, "--json", "--model", "teacher"))
    assert teacher["text"] == found[0]["text"], "greedy: the same answer each time"
    [short] = answers(there(finished.recipe_file, "--prompt", PROMPT, "--json", "--model", "student", "--max-tokens", "3"))
    assert (short["tokens"], found[1]["text"].startswith(short["text"])) == (3, True)


def test_several_prompts_and_the_bare_text_of_one_answer(there: Callable[..., Any], finished: Any) -> None:
    found = answers(there(finished.recipe_file, "--prompt", PROMPT, "--prompt", "1-2=", "--json", "--model", "teacher"))
    assert [entry["prompt"] for entry in found] == [PROMPT, "1-2="]
    called = there(finished.recipe_file, "--prompt", PROMPT, "--model", "teacher")
    assert (called.code, called.out) == (0, found[0]["text"] + "\n")
    both = there(finished.recipe_file, "--prompt", PROMPT).out
    assert f"[teacher] {PROMPT}\n{found[0]['text']}\n" in both
    assert f"[student (seed 0)] {PROMPT}\n" in both


def test_a_temperature_draws(there: Callable[..., Any], finished: Any) -> None:
    words = (finished.recipe_file, "--prompt", PROMPT, "--json", "--model", "teacher")
    greedy, drawn, again = (answers(there(*words, *more))[0]["text"] for more in ((), ("--temperature", "1"), ("--temperature", "1")))
    assert greedy != drawn == again


def test_a_pipe_is_one_prompt(there: Callable[..., Any], finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, code in ((f"{PROMPT}\n".encode(), 0), (b"\xff\xfe", 2), (b"\n", 2)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        called = there(finished.recipe_file, "--json", "--model", "teacher")
        assert called.code == code
        assert code == 2 or json.loads(called.out)["answers"][0]["prompt"] == PROMPT


def test_a_person_asks_line_by_line(there: Callable[..., Any], finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([PROMPT, "hello", "1-2=", ""])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    called = there(finished.recipe_file)
    assert called.code == 0
    assert called.out.count("student (seed 0), 20 tokens (cut)") == 2, "after what it cannot read it goes on"
    assert "the tokenizer cannot encode 'hello'" in called.err
    assert max(map(len, called.out.splitlines()[1:])) <= 80


def test_a_directory_answers_by_itself(there: Callable[..., Any], finished: Any) -> None:
    student = record(finished, "student.0")
    model = finished.store / student.prefix / "model"
    [own] = answers(there(model, "--prompt", PROMPT, "--json", "--max-tokens", "20"))
    [his] = answers(there(finished.recipe_file, "--prompt", PROMPT, "--json", "--model", "student"))
    assert (own["model"], own["text"]) == ("model", his["text"])
    called = there(model, "--prompt", PROMPT, "--model", "student")
    assert called.code == 2
    assert "is a directory with one model in it" in called.err


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_a_model_that_writes_no_text_is_refused(kd: Any, tmp_path: Path, kind: str) -> None:
    (tmp_path / "model").mkdir()
    called = kd("chat", "model", "--prompt", "x")
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("kd: model: no model is there (config.json cannot be read)")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": [kind]}))
    called = kd("chat", "model", "--prompt", "x")
    assert called.err == f"kd: model: holds a {kind}, which writes no text; kd chat is for causal language models\n"


def test_what_is_not_finished_is_said(small_recipe: Path, copy: Any, kd: Any, tmp_path: Path) -> None:
    forget(LocalStore(copy.store), record(copy, "student.0"))
    assert [entry["model"] for entry in answers(kd("chat", copy.recipe_file, "--prompt", PROMPT, "--json"))] == ["teacher"]
    called = kd("chat", copy.recipe_file, "--prompt", PROMPT, "--model", "both")
    assert (called.code, called.out) == (1, "")
    assert called.err.startswith(f"kd: small has no finished student in {copy.store} yet; run the recipe first (kd run)")
    called = kd("chat", copy.recipe_file, "--prompt", PROMPT, "--set", "run.store=elsewhere")
    assert (called.code, called.out) == (1, "")
    assert called.err.startswith(f"kd: small has no finished teacher in {tmp_path / 'elsewhere'} yet")


def test_damaged_weights_do_not_answer(copy: Any, kd: Any) -> None:
    weights = copy.store / record(copy, "student.0").prefix / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    called = kd("chat", copy.recipe_file, "--prompt", PROMPT, "--model", "student")
    assert (called.code, called.out) == (1, "")
    assert "model.safetensors" in called.err
