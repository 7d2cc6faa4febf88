"""What columns are, by their names and values; and what is not guessed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kd_core.errors import SourceError
from kd_core.first_recipe import Sample, class_student_of, class_teacher_of, look_at, recognise, student_of, teacher_of, write_recipe
from kd_core.first_recipe.data import slug
from kd_core.recipe import FileSource, Recipe
from kd_core.recipe.core_yaml import read_yaml
from kd_core.recipe.files import parse_recipe

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def sample_of(rows: list[dict[str, Any]]) -> Sample:
    return Sample({"kind": "file", "path": "x.jsonl"}, rows, "mine")


LONG = "a long answer, in several sentences, of which none can be told to be the final one of all of them"


@pytest.mark.parametrize(
    ("row", "fields", "task"),
    [
        ({"messages": CHAT, "id": "1"}, {"messages": "messages"}, {}),
        ({"conversations": [{"from": "human", "value": "a"}], "x": "y"}, {"messages": "conversations"}, {}),
        ({"chat": json.dumps(CHAT)}, {"messages": "chat"}, {}),
        (
            {"question": "q?", "answer": "so\n#### 7"},
            {"prompt": "{question}", "gold": "{answer}"},
            {"answer_marker": "####", "verifier": "math"},
        ),
        ({"question": "q?", "answer": "so\n#### yes"}, {"prompt": "{question}", "gold": "{answer}"}, {"verifier": "exact"}),
        (
            {"problem": "p", "solution": LONG, "answer": "\\frac{1}{2}"},
            {"prompt": "{problem}", "gold": "{solution}", "reference": "{answer}"},
            {"verifier": "math"},
        ),
        ({"Body": "b", "Question": "q", "Answer": "145.0"}, {"prompt": "{Body} {Question}", "reference": "{Answer}"}, {"verifier": "math"}),
        ({"instruction": "i", "input": "", "output": LONG}, {"prompt": "{instruction}\n\n{input}", "gold": "{output}"}, {}),
        ({"prompt": "p", "completion": LONG}, {"prompt": "{prompt}", "gold": "{completion}"}, {}),
        ({"prompt": "p", "id": "17"}, {"prompt": "{prompt}"}, {}),
        ({"frage": "p", "antwort": LONG}, {"prompt": "{frage}", "gold": "{antwort}"}, {}),
        ({"words": "p"}, {"prompt": "{words}"}, {}),
        ({"text": "t", "category": "c"}, {"prompt": "{text}", "gold": "{category}"}, {"kind": "classification", "input": "text"}),
        ({"tweet": "t", "label": "0", "label_text": "c"}, {"prompt": "{tweet}", "gold": "{label_text}"}, {"kind": "classification"}),
        ({"question": "t", "answer": LONG, "topic": "c"}, {"prompt": "{question}", "gold": "{answer}"}, {}),
    ],
)
def test_columns_are_recognised(row: dict[str, Any], fields: dict[str, str], task: dict[str, str]) -> None:
    rows = [{**row, "other": None}, *({**row} for _ in range(20))]
    if row.get("input") == "":
        rows[3]["input"] = "something"
    found = recognise(sample_of(rows))
    assert fields.items() <= found.fields.items()
    assert set(found.fields) - set(fields) <= {"gold"}
    assert task.items() <= found.task.items()
    assert bool(found.task) == bool(task)
    assert set(found.unused) == {"other", "id", "x", "topic", "label"} & {*row, "other"}
    sample = Sample({"kind": "file", "path": "x.jsonl"}, rows, "mine")
    teacher, student = {"kind": "pretrained", "model": "big"}, {"kind": "from_teacher", "every_nth_block": 2}
    if found.task.get("kind") == "classification":
        teacher, student = (of(None, image_edge=None, folder=Path()) for of in (class_teacher_of, class_student_of))
    text = write_recipe(sample, found, teacher=teacher, student=student, file="recipe.yaml")
    recipe = parse_recipe(read_yaml(text, "written"), origin="written")
    (source,) = recipe.prompts.sources
    assert isinstance(source, FileSource)
    assert {name: getattr(source, name) for name in found.fields} == dict(found.fields)
    assert 10 <= len(text.splitlines()) <= 25


def test_what_could_be_read_in_several_ways_is_not_guessed() -> None:
    with pytest.raises(SourceError, match="which of the columns 'x', 'y', 'z' is the prompt"):
        recognise(sample_of([{"x": "a", "y": "b", "z": "c"}]))
    with pytest.raises(SourceError, match="which of the columns 'n' is the prompt"):
        recognise(sample_of([{"n": ["a"]}]))


def test_a_server_is_asked_for_its_model_and_named_apart_from_its_address(tmp_path: Path) -> None:
    teacher = teacher_of("http://127.0.0.1:9/v1#org/big", folder=tmp_path)
    assert teacher == {"kind": "server", "model": "org/big", "revision": "unknown", "url": "http://127.0.0.1:9/v1"}
    commit = "0" * 40
    student = student_of(f"org/small@{commit}", teacher=teacher, folder=tmp_path)
    rows = [{"prompt": "p", "answer": "7"}] * 9
    text = write_recipe(
        Sample({"kind": "file", "path": "x"}, rows, "mine"), recognise(sample_of(rows)), teacher=teacher, student=student, file="r.yaml"
    )
    recipe: Recipe = parse_recipe(read_yaml(text, "written"), origin="written")
    assert (recipe.teacher.kind, recipe.run.teacher_url) == ("server", "http://127.0.0.1:9/v1")
    assert recipe.student.model_dump(include={"model", "revision"}) == {"model": "org/small", "revision": commit}


def test_names_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (slug("My Data_1"), slug("漢字")) == ("my-data-1", "")
    monkeypatch.chdir(tmp_path)
    for path, name in (("gsm8k/train.jsonl", "gsm8k"), ("sums.v1.jsonl.gz", "sums"), ("漢字/data.jsonl", "first")):
        file = Path(path)
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"q": "a"}\n' * 300)
        sample = look_at(path, folder=Path())
        assert (sample.name, len(sample.rows), sample.source["path"]) == (name, 200, path)
    assert look_at("*.jsonl.gz", folder=Path("gsm8k")).source["path"] == "../*.jsonl.gz"


def test_a_data_set_of_the_hub_is_pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub

    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(300)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: ["socratic", "main"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: type("Info", (), {"sha": "a" * 40}))
    sample = look_at("openai/gsm8k", folder=tmp_path)
    assert sample.source == {"kind": "dataset", "id": "openai/gsm8k", "revision": "a" * 40, "config": "main", "split": "train"}
    assert (len(sample.rows), sample.name) == (200, "gsm8k")
    assert look_at(f"openai/gsm8k@{'b' * 40}", folder=tmp_path).source["revision"] == "b" * 40


@pytest.mark.skipif("KD_TEST_DATA" not in os.environ, reason="needs real data sets")
@pytest.mark.parametrize(
    ("path", "fields", "verifier"),
    [
        ("gsm8k/train.jsonl", {"prompt": "{question}", "gold": "{answer}"}, "math"),
        ("math500/test.jsonl", {"prompt": "{problem}", "gold": "{solution}", "reference": "{answer}"}, "math"),
        ("svamp/SVAMP.json", {"prompt": "{Body} {Question}", "gold": "{Answer}", "reference": "{Answer}"}, "math"),
    ],
)
def test_real_data_sets_are_recognised(path: str, fields: dict[str, str], verifier: str, tmp_path: Path) -> None:
    sample = look_at(str(Path(os.environ["KD_TEST_DATA"]) / path), folder=tmp_path)
    found = recognise(sample)
    assert (dict(found.fields), found.task["verifier"]) == (fields, verifier)
