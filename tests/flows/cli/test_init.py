"""``kd init``: what it recognises and says, what it refuses, and that what it writes runs to its report without an edit."""

import builtins
import csv
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_core.recipe.schema import recipe_schema
from kd_core.teacher.models import LoadedModel, save_model

FEW = ("training.steps=2", "training.batch_rows=4", "seeds=[0, 1]", "answers.max_tokens=6", "run={threads: 1, device: cpu}")


def sums(num: int = 60) -> list[tuple[str, str]]:
    return [(f"What is {i} plus {i + 1}?", f"{i}+{i + 1}={2 * i + 1}\n#### {2 * i + 1}") for i in range(num)]


def gsm8k(path: Path) -> None:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in sums()))


def facts(path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("Question", "Answer", "id"), *((q, a.split("#### ")[1], str(i)) for i, (q, a) in enumerate(sums()))])


def chats(path: Path) -> None:
    def turns(i: int, q: str, a: str) -> list[dict[str, str]]:
        first = [{"role": "system", "content": "Count."}] if i % 3 else []
        more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}] if i % 2 else []
        return [*first, {"role": "user", "content": q}, {"role": "assistant", "content": a}, *more]

    path.write_text("".join(json.dumps({"messages": turns(i, q, a)}) + "\n" for i, (q, a) in enumerate(sums())))


def labelled(path: Path) -> None:
    rows = [(f"Where is my {thing} number {i}?", thing) for i in range(40) for thing in ("card", "money", "code")]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])


def pictures(path: Path) -> None:
    rng = random.Random(0)
    for i in range(60):
        image = Image.new("L", (8, 8))
        image.putdata([rng.randrange(128) + 127 * (i % 2) for _ in range(64)])
        (path / ("bright" if i % 2 else "dark")).mkdir(parents=True, exist_ok=True)
        image.save(path / ("bright" if i % 2 else "dark") / f"{i}.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "said"),
    [(labelled, "train.csv", "gold: '{category}' (by its name: its class)"), (pictures, "images", "a folder of images is a class")],
    ids=["texts", "images"],
)
def test_what_is_written_of_classes_runs_to_its_report(tmp_path: Path, kd: Any, make: Callable[[Path], None], name: str, said: str) -> None:
    make(tmp_path / name)
    called = kd("init", "--data", name)
    assert (called.code, called.err) == (0, "")
    assert said in called.out
    text = (tmp_path / "recipe.yaml").read_text()
    assert 10 <= len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines())) <= 140
    few = (
        "teacher.training={steps: 4, batch_rows: 8, learning_rate: 0.001}",
        "training.steps=2",
        "seeds=[0, 1]",
        "run={threads: 1, device: cpu}",
    )
    settings = [word for change in few for word in ("--set", change)]
    run = kd("run", "--local", "recipe.yaml", *settings)
    assert run.code == 0, run.err
    assert set(json.loads(kd("report", "--json", "recipe.yaml", *settings).out)["models"]) >= {"teacher", "student", "ablation_hard"}


@pytest.fixture
def teacher(tmp_path: Path, bpe_tokenizer: PreTrainedTokenizerFast) -> str:
    """A tiny model with a chat template, in a directory beside the data."""
    config = LlamaConfig(
        vocab_size=len(bpe_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=bpe_tokenizer.eos_token_id,
        pad_token_id=bpe_tokenizer.pad_token_id,
    )
    save_model(LoadedModel(LlamaForCausalLM(config).eval(), bpe_tokenizer, len(bpe_tokenizer)), tmp_path)
    return "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (gsm8k, "train.jsonl", ["answer_marker: '####'", "verifier: 'math'", "prompt: '{question}' (by its name)"]),
        (chats, "chats.jsonl", ["messages: 'messages' (lists of turns", "answers are not verified"]),
        (facts, "facts.csv", ["reference: '{Answer}' (short enough to verify answers by)", "not used: id"]),
    ],
    ids=["gsm8k", "messages", "csv"],
)
def test_what_is_written_runs_to_its_report(
    tmp_path: Path, kd: Any, teacher: str, make: Callable[[Path], None], name: str, said: list[str]
) -> None:
    make(tmp_path / name)
    called = kd("init", "--data", name, "--teacher", teacher)
    assert (called.code, called.err) == (0, "")
    for words in [*said, "Plan (nothing has been run)", "Written: recipe.yaml. Then:  kd run recipe.yaml"]:
        assert words in called.out
    text = (tmp_path / "recipe.yaml").read_text()
    assert 10 <= len(text.splitlines()) <= 25
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert json.loads((tmp_path / named).read_text()) == recipe_schema()
    assert max(map(len, text.splitlines())) <= 140
    run = kd("run", "--local", "recipe.yaml", *(word for change in FEW for word in ("--set", change)))
    assert run.code == 0, run.err
    report = kd("report", "--json", "recipe.yaml", *(word for change in FEW for word in ("--set", change)))
    assert set(json.loads(report.out)["models"]) >= {"teacher", "student", "baseline"}


def test_nothing_is_overwritten_and_nothing_half_told_is_guessed(tmp_path: Path, kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gsm8k(tmp_path / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text("mine")
    called = kd("init", "--data", "train.jsonl", "--teacher", "model")
    assert called.code == 2
    assert "recipe.yaml is there already, and is not overwritten" in called.err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    called = kd("init", "--data", "train.jsonl", "--out", "other.yaml")
    assert called.code == 2
    assert "there is no terminal to ask on; give --teacher" in called.err
    assert "no folder 'gone'" in kd("init", "--data", "train.jsonl", "--teacher", "model", "--out", "gone/x.yaml").err
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "recipe.yaml"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "gone.jsonl", "--teacher", "model"], "there is no file 'gone.jsonl' here; name a file, or a data set of the hub"),
        (["--data", ".", "--teacher", "model"], "--data: . is a folder without folders of images"),
        (["--data", "odd.csv", "--teacher", "model"], "which of the columns 'x', 'y', 'z' is the prompt?"),
        (["--data", "train.jsonl", "--teacher", "pkg://nothing/x.gguf"], "package 'nothing' is not installed"),
        (["--data", "train.jsonl", "--teacher", "http://127.0.0.1:9#big"], "--student: a server's model has no blocks to give here"),
        (["--data", "train.jsonl", "--teacher", "http://127.0.0.1:9"], "does not say which models there are"),
        (["--data", "train.jsonl", "--teacher", "org/none"], "--teacher: no directory 'org/none' is here, and the hub's newest commit"),
        (["--data", "train.jsonl", "--teacher", "model", "--student", "1/4"], "student.every_nth_block: 4, and the teacher has 4 blocks"),
        (
            ["--data", "org/none", "--teacher", "model"],
            "--data: no file 'org/none' is here, and the hub's data set of that name cannot be read",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path: Path, kd: Any, teacher: str, words: list[str], message: str) -> None:
    gsm8k(tmp_path / "train.jsonl")
    (tmp_path / "odd.csv").write_text("x,y,z\n1,2,3\n")
    called = kd("init", *words)
    assert called.code in (1, 2)
    assert message in called.err
    assert not (tmp_path / "recipe.yaml").exists()


def test_without_flags_it_asks_and_asks_again(tmp_path: Path, kd: Any, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gsm8k(tmp_path / "train.jsonl")
    answers = iter(["gone.jsonl", "train.jsonl", teacher, "", ""])
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr(builtins, "input", lambda *_: next(answers))
    called = kd("init")
    assert called.code == 0, called.err
    assert "there is no file 'gone.jsonl' here" in called.out
    assert "every_nth_block: 2" in (tmp_path / "recipe.yaml").read_text()


def test_paths_are_written_from_the_recipe_s_folder(tmp_path: Path, kd: Any, teacher: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "recipes").mkdir()
    gsm8k(tmp_path / "data/train.jsonl")
    called = kd("init", "--data", "data/train.jsonl", "--teacher", teacher, "--student", "1/3", "--out", "recipes/mine.yaml")
    assert called.code == 0, called.err
    text = (tmp_path / "recipes/mine.yaml").read_text()
    assert "path: ../data/train.jsonl" in text
    assert "model: ../model" in text
    assert "every_nth_block: 3" in text
    assert kd("plan", "recipes/mine.yaml").code == 0
