"""Classes of texts and images, from files to a promoted student, and what is refused on the way."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from kd_core.artifacts import materialize
from kd_core.prompts import INPUTS_FILE, Inputs
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import Graph, build_graph, open_node
from kd_core.store import LocalStore

ANIMALS = {"cat": ("purrs", "mews", "hunts mice"), "dog": ("barks", "fetches a stick", "guards the house"), "hen": ("lays eggs", "clucks")}
WHEN = ("today", "at noon", "in the yard", "again", "all day", "when it rains", "near me", "quietly", "twice")
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAINING = {"steps": 150, "batch_rows": 16, "learning_rate": 0.01}


def recipe_of(source: Mapping[str, Any], family: str, config: Mapping[str, Any], given: str, **changes: Any) -> dict[str, Any]:
    """A small recipe of classes."""
    return {
        "name": "classes",
        "seeds": [0],
        "task": {"kind": "classification", "input": given},
        "prompts": {"sources": [source], "split": {"validation": 0.1, "test": 0.3}},
        "teacher": {"kind": "trained_classifier", "family": family, "config": dict(config), "training": TRAINING},
        "answers": None,
        "soft_labels": {"kind": "dense"},
        "student": {"kind": "new_classifier", "family": family, "config": dict(config)},
        "objective": {"supervision": "soft", "hard_weight": 0.1, "soft_weight": 0.9, "temperature": 1.0},
        "training": TRAINING,
        "evaluation": {
            "suites": [{"kind": "held_out", "name": "held_out"}],
            "generate": None,
            "compare": ["teacher", "ablation_hard"],
        },
        "gate": {"rules": [{"kind": "ceiling", "metric": "parameter_ratio", "maximum": 2.0}]},
        "publish": "classes",
        "run": {"threads": 1, "device": "cpu", "parallel": 1},
        **changes,
    }


def texts(path: Path, *, unlabelled: int = 0) -> Path:
    """A table of sentences about animals, some without a class."""
    rows = [f"the {name} {does} {when},{name}" for name, does_all in ANIMALS.items() for does in does_all for when in WHEN]
    random.Random(0).shuffle(rows)
    for i in range(unlabelled):
        rows[i] = rows[i].rpartition(",")[0] + ","
    path.write_text("text,animal\n" + "\n".join(rows) + "\n")
    return path


TEXT = {"kind": "file", "path": "animals.csv", "prompt": "{text}", "gold": "{animal}"}


@pytest.fixture
def run(kd: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a recipe to its end: what it says."""

    def go(recipe: Mapping[str, Any], *words: str) -> dict[str, Any]:
        (tmp_path / "classes.yaml").write_text(yaml.safe_dump(dict(recipe)))
        called = kd("run", "--local", "--json", "classes.yaml", *words)
        assert called.code == 0, called.err
        said: dict[str, Any] = json.loads(called.out)
        return said

    return go


def graph(tmp_path: Path) -> tuple[LocalStore, Graph]:
    store = LocalStore(tmp_path / ".kd/store")
    return store, build_graph(load_recipe(tmp_path / "classes.yaml"), store)


def table(tmp_path: Path, node: str, name: str) -> list[dict[str, Any]]:
    """A table of a finished node."""
    store, nodes = graph(tmp_path)
    folder = tmp_path / f"files-{node}"
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = pq.read_table(materialize(store, open_node(store, nodes[node]), folder) / name).to_pylist()
    return rows


def report(kd: Callable[..., Any]) -> dict[str, Any]:
    called = kd("report", "classes.yaml", "--json")
    assert called.code == 0, called.err
    found: dict[str, Any] = json.loads(called.out)
    return found


def test_texts_from_a_table_to_a_promoted_student(run, kd, tmp_path) -> None:
    texts(tmp_path / "animals.csv")
    said = run(recipe_of(TEXT, "bert", BERT, "text"))
    assert said["verdict"]["promote"]
    models = report(kd)["models"]
    assert models["teacher"]["metrics"]["accuracy"]["value"] > 0.9
    assert models["student"]["metrics"]["accuracy"]["value"] > 0.9
    assert models["student"]["metrics"]["kl"]["value"] < 0.5
    guesses = table(tmp_path, "evaluate.student", "guesses.parquet")
    assert all(sorted(row["classes"]) == sorted(ANIMALS) and abs(sum(row["probabilities"]) - 1) < 1e-5 for row in guesses)
    again = run(recipe_of(TEXT, "bert", BERT, "text"))
    assert {node["status"] for node in again["nodes"]} == {"hit"}


def test_a_folder_of_images_keeps_each_image_once_and_resumes_to_the_same_student(run, kd, tmp_path) -> None:
    from PIL import Image

    draw = random.Random(1)
    for name, light in {"dark": 40, "bright": 200}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(60):
            image = Image.new("L", (8, 8))
            image.putdata([light + draw.randrange(40) for _ in range(64)])
            image.save(tmp_path / "pictures" / name / f"{i}.png")
    (tmp_path / "pictures" / "bright" / "copy.png").write_bytes((tmp_path / "pictures" / "bright" / "0.png").read_bytes())
    recipe = recipe_of({"kind": "folder", "path": "pictures"}, "vit", VIT, "image")
    digests = {node["name"]: node["digest"] for node in run(recipe)["nodes"]}
    found = report(kd)
    assert found["models"]["student"]["metrics"]["accuracy"]["value"] > 0.9
    assert found["counts"]["Prompts"]["duplicate"] == 1
    assert any(sample["picture_png"] for sample in found["class_samples"])
    store, nodes = graph(tmp_path)
    (tmp_path / "prompts").mkdir()
    inputs = Inputs(materialize(store, open_node(store, nodes["prompts"]), tmp_path / "prompts") / INPUTS_FILE)
    assert len(inputs) == 120
    other = {node["name"]: node["digest"] for node in run(recipe, "--set", "run.store=other")["nodes"]}
    assert digests["student.0"] == other["student.0"]
    assert digests["soft_labels"] == other["soft_labels"]


def test_a_class_that_is_left_out_is_in_no_row_and_is_measured_apart(run, kd, tmp_path) -> None:
    texts(tmp_path / "animals.csv")
    rules = [{"kind": "floor", "metric": "unseen_recall", "minimum": 0.0}, {"kind": "floor", "metric": "accuracy", "minimum": 0.0}]
    run(recipe_of(TEXT, "bert", BERT, "text", curate={"leave_out_classes": ["hen"]}, gate={"rules": rules}))
    assert {row["text"] for row in table(tmp_path, "curate", "rows.parquet")} == {"cat", "dog"}
    assert {row["text"] for row in table(tmp_path, "curate", "validation.parquet")} == {"cat", "dog"}
    assert {row["reason"] for row in table(tmp_path, "curate", "rejected.parquet")} == {"left_out_class"}
    metrics = report(kd)["models"]["ablation_hard"]["metrics"]
    hens = sum(row["unseen_recall"] is not None for row in table(tmp_path, "evaluate.student", "scores.parquet"))
    assert (metrics["unseen_recall"]["value"], metrics["unseen_recall"]["n"], metrics["unseen_recall"]["left_out"]) == (0.0, hens, 0)
    assert hens >= 2
    options: list[list[str]] = [[], ["curate.leave_out_classes=[cat]"]]
    before, after = (build_graph(load_recipe(tmp_path / "classes.yaml", more), graph(tmp_path)[0]) for more in options)
    assert before["teacher"].fingerprint == after["teacher"].fingerprint
    assert before["evaluate.teacher"].fingerprint != after["evaluate.teacher"].fingerprint  # what is unseen is part of a measurement


def test_a_row_without_a_class_is_learnt_by_the_teachers(run, tmp_path) -> None:
    texts(tmp_path / "animals.csv", unlabelled=30)
    run(recipe_of(TEXT, "bert", BERT, "text"))
    rows = [row for row in table(tmp_path, "curate", "rows.parquet") if row["source"] == "teacher"]
    prompts = {row["prompt_id"]: row["prompt"] for row in table(tmp_path, "prompts", "prompts.parquet")}
    assert len(rows) > 10
    assert sum(row["text"] in prompts[row["prompt_id"]] for row in rows) > 0.9 * len(rows)


def test_models_that_were_trained_elsewhere_teach_and_learn(run, kd, tmp_path) -> None:
    """A teacher whose classes have another order than ours, and a student that gets a new head for them."""
    from transformers import BertConfig, BertForSequenceClassification

    from kd_core.recipe import WordPieces
    from kd_core.teacher.classifiers import new_tokenizer

    texts(tmp_path / "animals.csv")
    run(recipe_of(TEXT, "bert", BERT, "text"))
    store, nodes = graph(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    teacher = materialize(store, open_node(store, nodes["teacher"]), tmp_path / "elsewhere") / "model"
    tokenizer = new_tokenizer(["a cat", "a dog", "some hen barks"], WordPieces(size=64), longest=16)
    BertForSequenceClassification(BertConfig(**BERT, vocab_size=len(tokenizer), num_labels=2)).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    recipe = recipe_of(TEXT, "bert", BERT, "text")
    recipe |= {"teacher": {"kind": "pretrained", "model": str(teacher)}, "student": {"kind": "pretrained", "model": "small"}}
    run(recipe)
    metrics = report(kd)["models"]
    assert metrics["teacher"]["metrics"]["accuracy"]["value"] > 0.9
    assert metrics["student"]["metrics"]["accuracy"]["value"] > 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"curate": {"leave_out_classes": ["cow"]}}, "curate.leave_out_classes: cow: no class of the teacher; it has cat, dog, hen"),
        ({"answers": {"num_samples": 1, "temperature": 0.0, "max_tokens": 4}}, "answers: task.kind: classification has no use for it"),
        ({"student": {"kind": "from_teacher"}}, "student: a classifier is new_classifier, or pretrained"),
        (
            {"student": {"kind": "new_classifier", "family": "bart_like"}},
            "student.family: transformers has no classifier of texts of the family 'bart_like'",
        ),
        (
            {"student": {"kind": "new_classifier", "family": "bert", "config": {"hiden_size": 8}}},
            "student.config: a bert has no hiden_size; did you mean 'hidden_size'?",
        ),
        ({"task": {"kind": "classification", "input": "image"}}, "animals.csv:2: image 'the "),
        ({"gate": {"rules": [{"kind": "floor", "metric": "pass_at_1", "minimum": 0.5}]}}, "pass_at_1 is not measured by this recipe"),
    ],
)
def test_what_does_not_fit_is_said(kd, tmp_path, change, said) -> None:
    texts(tmp_path / "animals.csv")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(recipe_of(TEXT, "bert", BERT, "text", **change)))
    called = kd("run", "--local", "classes.yaml")
    assert called.code in (1, 2)
    assert said in called.err
    assert "Traceback" not in called.err


def test_a_broken_image_is_named_before_anything_is_trained(kd, tmp_path) -> None:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "pictures" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    recipe = recipe_of({"kind": "folder", "path": "pictures"}, "vit", VIT, "image")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(recipe))
    called = kd("run", "--local", "classes.yaml")
    assert called.code != 0
    assert "1.png: no image that can be read" in called.err
    assert not (tmp_path / ".kd/store/artifacts/teacher").exists()


def test_a_plan_knows_classes_and_the_doctor_says_that_it_does_not(kd, tmp_path) -> None:
    texts(tmp_path / "animals.csv")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(recipe_of(TEXT, "bert", BERT, "text")))
    planned = kd("plan", "classes.yaml", "--json")
    assert planned.code == 0, planned.err
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(recipe_of(TEXT, "brt", BERT, "text")))
    found = kd("plan", "wrong.yaml", "--json")
    assert found.code == 2
    assert json.loads(found.out)["faults"] == [
        "teacher.family: transformers has no classifier of texts of the family 'brt'; did you mean 'bert'?"
    ]
    called = kd("doctor", "classes.yaml")
    assert "task.kind: classification has no use for this yet" in called.out + called.err
