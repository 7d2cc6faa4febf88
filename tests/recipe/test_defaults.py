"""A recipe of ten lines is a whole recipe: what it leaves out is filled in once, and is the same as if it were written."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_core.errors import RecipeError
from kd_core.recipe import Constant, Dense, Objective, Recipe, Sampled, StudentTraining, TopK
from kd_core.recipe.defaults import fill_in, filled_in
from kd_core.recipe.files import dump_recipe, parse_recipe, what_is_filled_in
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
ARCHITECTURE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
TEACHERS: dict[str, Any] = {
    "pretrained": {"kind": "pretrained", "model": "org/big", "revision": REVISION},
    "server": {"kind": "server", "model": "big", "revision": "2026-01"},
    "trained": {
        "kind": "trained",
        "sources": [{"kind": "reasoning_gym", "task": "chain_sum", "num": 50, "seed": 1, "style": "running_totals"}],
        "tokenizer": {"kind": "characters", "alphabet": "0123456789+=#"},
        "architecture": ARCHITECTURE,
        "training": {"steps": 10, "batch_rows": 4, "learning_rate": 0.001},
    },
}
STUDENTS: dict[str, Any] = {
    "pretrained": {"kind": "pretrained", "model": "org/small", "revision": REVISION},
    "from_teacher": {"kind": "from_teacher", "every_nth_block": 2},
    "config": {"kind": "config", "architecture": ARCHITECTURE},
}
SOURCES: dict[str, Any] = {
    "gold": {"kind": "file", "path": "data.jsonl", "prompt": "{q}", "gold": "{a}"},
    "reference": {"kind": "file", "path": "data.jsonl", "prompt": "{q}", "reference": "{a}"},
    "prompts": {"kind": "file", "path": "data.jsonl", "prompt": "{q}"},
    "generated": {"kind": "reasoning_gym", "task": "chain_sum", "num": 50, "seed": 1},
}


def short(*, teacher: str = "pretrained", student: str = "from_teacher", source: str = "gold", **fields: Any) -> dict[str, Any]:
    """A recipe that says as little as it must, and some more fields."""
    return {
        "name": "mine",
        "task": {"answer_marker": "####", "verifier": "math"},
        "prompts": {"sources": [SOURCES[source]]},
        "teacher": TEACHERS[teacher],
        "student": STUDENTS[student],
        **fields,
    }


def read(**fields: Any) -> Recipe:
    return parse_recipe(short(**fields), origin="test")


# ---------------------------------------------------------------------------------------------- it is whole, and the same


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("teacher", "students"), [("pretrained", STUDENTS), ("server", ["pretrained"]), ("trained", STUDENTS)])
def test_every_short_recipe_is_valid_and_written_out_it_is_the_same(source: str, teacher: str, students: Any) -> None:
    for student in students:
        for marker in ("####", None):
            task = {"verifier": "math"} if marker is None else {"verifier": "math", "answer_marker": marker}
            recipe = read(teacher=teacher, student=student, source=source, task=task)
            assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), origin="dump") == recipe
            assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
            assert Recipe.model_validate(recipe) is recipe


def test_a_recipe_that_states_the_defaults_has_the_same_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(json.dumps({"q": "1+1", "a": "2 #### 2"}) + "\n")
    store = LocalStore(tmp_path / "store")
    for teacher in TEACHERS:
        student = "pretrained" if teacher == "server" else "config"
        data = short(teacher=teacher, student=student)
        stated = json.loads(json.dumps(fill_in(data)))
        assert filled_in(stated) == {}
        one, other = (build_graph(parse_recipe(d, origin="test"), store) for d in (data, stated))
        assert {name: node.fingerprint for name, node in one.items()} == {name: node.fingerprint for name, node in other.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_filling_in_changes_nothing_that_is_written(path: Path) -> None:
    data = yaml.safe_load(path.read_text())

    def holds(after: Any, before: Any) -> bool:
        if isinstance(before, Mapping):
            return all(name in after and holds(after[name], value) for name, value in before.items())
        return bool(after == before)

    assert holds(fill_in(data), data)
    assert {name.partition(".")[0] for name in what_is_filled_in(path)}.isdisjoint({"name", "prompts", "teacher", "student"})


def test_what_is_not_there_is_named_and_nothing_else() -> None:
    data = short()
    del data["student"]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, origin="test")
    assert str(caught.value) == "test: student: this field is required and is not there"
    with pytest.raises(RecipeError, match=r"task\.verifier: this field is required and is not there"):
        read(task={"answer_marker": "####"})


def test_what_is_not_a_recipe_passes_through_to_the_check() -> None:
    for name in short():
        for value in (None, 3, [], {}, {"kind": []}, [3]):
            with suppress(RecipeError):
                parse_recipe({**short(), name: value}, origin="test")


# ---------------------------------------------------------------------------------------------- one rule a field


def test_the_defaults_of_a_pretrained_teacher_with_gold() -> None:
    recipe = read()
    assert (recipe.seeds, recipe.publish, recipe.task.template) == ((0, 1, 2), "mine", "chat")
    assert (recipe.prompts.split.validation, recipe.prompts.split.test) == (0.05, 0.1)
    assert recipe.answers is not None
    assert (recipe.answers.num_samples, recipe.answers.temperature, recipe.answers.max_tokens) == (1, 0.7, 256)
    assert recipe.soft_labels == Sampled(kind="sampled", num_draws=25, temperature=1.0)
    assert recipe.objective == Objective(
        supervision="soft",
        hard_weight=0.1,
        soft_weight=0.9,  # type: ignore[arg-type]  # numbers become schedules
    )
    assert recipe.training == StudentTraining(epochs=3, least_steps=50, batch_rows=16, learning_rate=2e-4, warmup_share=0.05)
    assert recipe.evaluation.generate is not None
    assert (recipe.evaluation.generate.temperature, recipe.evaluation.generate.max_tokens) == (0.0, 256)
    assert recipe.evaluation.compare == ("teacher", "baseline")
    assert [(rule.kind, rule.metric) for rule in recipe.gate.rules] == [
        ("better_than", "pass_at_1"),
        ("not_worse_than_champion", "pass_at_1"),
        ("ceiling", "parameter_ratio"),
    ]


def test_a_server_teaches_by_its_words() -> None:
    recipe = read(teacher="server", student="pretrained")
    assert (recipe.soft_labels, recipe.objective.supervision, recipe.evaluation.compare) == (None, "hard", ("baseline",))
    assert recipe.answers is not None
    assert (recipe.answers.num_samples, recipe.answers.max_tokens) == (4, 512)
    assert [rule.kind for rule in recipe.gate.rules] == ["better_than", "not_worse_than_champion"]
    greedy = read(teacher="server", student="pretrained", answers={"temperature": 0}).answers
    assert greedy is not None
    assert greedy.num_samples == 1


def test_a_small_alphabet_is_kept_whole_and_answers_fit_its_positions() -> None:
    recipe = read(teacher="trained", student="config")
    assert recipe.task.template == "plain"
    assert recipe.soft_labels == Dense(kind="dense")
    assert recipe.answers is not None
    assert recipe.answers.max_tokens == 32


def test_a_written_null_stays_null() -> None:
    recipe = read(answers=None, soft_labels=None, evaluation={"generate": None})
    assert (recipe.answers, recipe.soft_labels, recipe.evaluation.generate) == (None, None, None)
    assert recipe.objective.supervision == "hard"
    assert recipe.gate.rules[0].metric == "nll"


def test_text_without_a_final_answer_is_not_judged_by_one() -> None:
    recipe = read(task={})
    assert (recipe.task.verifier, recipe.curate.verify, recipe.curate.keep_unverified) == ("exact", False, True)
    assert recipe.evaluation.generate is None
    assert {rule.metric for rule in recipe.gate.rules} == {"nll", "parameter_ratio"}
    assert read(task={"verifier": "exact"}, source="reference").curate.verify


def test_one_seed_or_no_gold_asks_for_no_comparison_that_cannot_be_made() -> None:
    assert "better_than" not in [rule.kind for rule in read(seeds=[7]).gate.rules]
    assert read(source="reference").evaluation.compare == ("teacher", "ablation_hard")
    assert read(source="reference").gate.rules[0].than == "ablation_hard"  # type: ignore[union-attr]
    assert "baseline" not in read(curate={"gold_rows": 0}).evaluation.compare
    benchmark = {"kind": "source", "name": "b", "source": SOURCES["gold"]}
    assert read(evaluation={"suites": [benchmark]}).prompts.split.test == 0.0


@pytest.mark.parametrize(
    ("objective", "labels"),
    [
        ({"temperature": 2.0}, Sampled(kind="sampled", num_draws=25, temperature=2.0)),
        ({"divergence": "jsd"}, TopK(kind="topk", k=64, temperatures=(1.0,))),
        ({"divergence": {"kind": "reverse_kl"}, "temperature": 4}, TopK(kind="topk", k=64, temperatures=(4.0,))),
        ({"temperature": {"kind": "piecewise", "values": [2, 1], "at": [0.5]}}, TopK(kind="topk", k=64, temperatures=(2.0, 1.0))),
        ({"supervision": "hard"}, None),
    ],
)
def test_soft_labels_serve_the_objective(objective: dict[str, Any], labels: Any) -> None:
    assert read(objective=objective).soft_labels == labels


def test_the_objective_takes_the_temperature_of_its_labels() -> None:
    assert read(soft_labels={"kind": "sampled", "temperature": 3}).objective.temperature == Constant(kind="constant", value=3.0)
    assert read(soft_labels={"kind": "topk", "temperatures": [2, 1]}).objective.temperature == Constant(kind="constant", value=2.0)
    with pytest.raises(RecipeError, match="a ramp is not among the temperatures stored"):
        read(objective={"temperature": {"kind": "linear", "start": 1, "end": 2}})


@pytest.mark.parametrize(
    ("student", "rate"),
    [
        (STUDENTS["pretrained"], 5e-5),
        (STUDENTS["from_teacher"], 2e-4),
        ({**STUDENTS["pretrained"], "adapter": {"kind": "lora", "rank": 2, "alpha": 4}}, 2e-4),
        (STUDENTS["config"], 0.003),
        ({**STUDENTS["config"], "architecture": {**ARCHITECTURE, "hidden_size": 576}}, 0.001),
    ],
)
def test_the_learning_rate_goes_by_kind_and_width(student: Any, rate: float) -> None:
    data = short()
    assert parse_recipe({**data, "student": student}, origin="test").training.learning_rate == rate


def test_half_a_part_is_filled_up() -> None:
    recipe = read(training={"steps": 40}, answers={"max_tokens": 10}, prompts={"sources": [SOURCES["gold"]], "split": {"test": 0.3}})
    assert (recipe.training.steps, recipe.training.epochs, recipe.training.batch_rows) == (40, None, 16)
    assert recipe.evaluation.generate is not None
    assert recipe.evaluation.generate.max_tokens == 10
    assert (recipe.prompts.split.validation, recipe.prompts.split.test) == (0.05, 0.3)
    assert list(filled_in(short(training={"steps": 40})))[-7:] == [
        "objective", "training.warmup_share", "training.batch_rows", "training.learning_rate", "evaluation", "gate", "publish",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- steps of epochs


@pytest.mark.parametrize(
    ("fields", "rows", "steps", "warmup"),
    [
        ({"epochs": 3}, 100, 38, 0),
        ({"epochs": 0.5, "warmup_share": 0.1}, 1000, 63, 6),
        ({"epochs": 3, "least_steps": 50, "warmup_share": 0.05}, 100, 50, 2),
        ({"epochs": 3, "least_steps": 50}, 1000, 375, 0),
        ({"epochs": 0.001}, 1, 1, 0),
        ({"steps": 20, "warmup_steps": 5}, 7, 20, 5),
        ({"steps": 20, "warmup_share": 0.99}, 7, 20, 19),
    ],
)
def test_steps_follow_from_rows(fields: dict[str, Any], rows: int, steps: int, warmup: int) -> None:
    training = StudentTraining(batch_rows=8, learning_rate=0.1, ema_decay=0.9, **fields).for_rows(rows)
    assert (training.steps, training.warmup_steps, training.batch_rows, training.ema_decay) == (steps, warmup, 8, 0.9)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"steps": 3, "epochs": 1}, "give one of steps and epochs"),
        ({"steps": 3, "least_steps": 1}, "least_steps goes with epochs"),
        ({"steps": 3, "warmup_steps": 1, "warmup_share": 0.1}, "give one of warmup_steps and warmup_share"),
        ({"epochs": 3, "warmup_steps": 1}, "warmup_steps goes with steps"),
        ({"steps": 3, "warmup_steps": 3}, "warmup_steps 3 must be below steps 3"),
    ],
)
def test_a_training_has_one_length(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError, match=f"test: training: {line}"):
        read(training=fields)
