"""Every wrong key, type, range and combination is one line with its path in the YAML and what is allowed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from kd_core.errors import RecipeError
from kd_core.recipe import ARMS, Dense, Recipe, schedule_values
from kd_core.recipe.core_yaml import read_yaml
from kd_core.recipe.files import dump_recipe, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
QUICKSTART = next(path for path in RECIPES if path.stem == "quickstart")
SERVER = "teacher={kind: server, model: m, revision: r}"
NO_LABELS = "soft_labels=null"
LIVE = "objective.features={kind: hidden_states, source: live}"


def load(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def refusal(*overrides: str) -> str:
    """What is said of these overrides, without lines of the file."""
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    return re.sub(rf"^{re.escape(str(QUICKSTART))}:\d+: ", f"{QUICKSTART}: ", str(caught.value), flags=re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(read_yaml(dump_recipe(recipe), "dump"), origin="dump") == recipe
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), origin="dump") == recipe, "whatever version of YAML a reader knows"
    assert recipe.name == path.stem


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 1


# ------------------------------------------------------------------------------------------- one line a mistake

WRONG = [
    # keys
    ("training.step=3", "training.step: unknown field; did you mean 'steps'? allowed: adam_betas, batch_rows, clip_norm"),
    ("nam=3", "nam: unknown field; did you mean 'name'? allowed: answers, curate, description"),
    ("student.architecture.num_head=3", "student.architecture.num_head: unknown field; did you mean 'num_heads'? allowed: hidden_size"),
    ("prompts.sources.0.x=1", "prompts.sources[0].x: unknown field; allowed: config, kind, num, seed, style, task"),
    ("run.s3.endpoit=x", "run.s3.endpoit: unknown field; did you mean 'endpoint'? allowed: checksums, endpoint, region"),
    (
        "evaluation.suites=[{kind: source, name: a, source: {kind: file, path: p, prompt: q, glod: g}}]",
        "evaluation.suites[0].source.glod: unknown field; did you mean 'gold'? allowed: gold, kind, limit, messages, path,",
    ),
    # what must be there
    ("student={kind: config}", "student.architecture: this field is required and is not there"),
    ("training.adam_betas=[0.9]", "training.adam_betas[1]: this field is required and is not there"),
    (
        "evaluation.suites=[{kind: source, name: a, source: {kind: file, path: p}}]",
        "evaluation.suites[0].source: say either prompt, such as '{question}', or messages",
    ),
    # kinds
    ("student.kind=foo", "student.kind: found 'foo'; allowed: 'config', 'from_teacher', 'pretrained', 'new_classifier'"),
    (
        "prompts.sources.0.kind=csv",
        "prompts.sources[0].kind: found 'csv'; allowed: 'file', 'dataset', 'reasoning_gym', 'folder', 'scikit_learn'",
    ),
    ("gate.rules.0.kind=foo", "gate.rules[0].kind: found 'foo'; allowed: 'better_than', 'not_worse_than_champion', 'floor', 'ceiling'"),
    ("student={}", "student: expected fields with a 'kind', found {}; allowed kinds: config, from_teacher, new_classifier, pretrained"),
    # types
    ("training.steps=x", "training.steps: input should be a valid integer, unable to parse string as an integer, found 'x'"),
    ("student=3", "student: input should be a valid mapping, found 3"),
    ("seeds=3", "seeds: input should be a valid list, found 3"),
    ("publish=null", "publish: input should be a valid string, found None"),
    (
        "objective.temperature=hot",
        "objective.temperature: must be a number or a schedule, such as {kind: linear, start: 1.0, end: 0.0}, found 'hot'",
    ),
    # ranges
    ("training.steps=0", "training.steps: input should be greater than or equal to 1, found 0"),
    ("training.learning_rate=.nan", "training.learning_rate: input should be a finite number, found nan"),
    ("prompts.split.test=1.5", "prompts.split.test: input should be less than or equal to 1, found 1.5"),
    ("prompts.sources.0.num=0", "prompts.sources[0].num: input should be greater than or equal to 1, found 0"),
    ("prompts.sources=[]", "prompts.sources: list should have at least 1 item, not 0, found []"),
    ("seeds=[]", "seeds: list should have at least 1 item, not 0, found []"),
    ("seeds=[-1]", "seeds[0]: input should be greater than or equal to 0, found -1"),
    ("seeds=[4294967296]", "seeds[0]: input should be less than 4294967296, found 4294967296"),
    ("name=A B", "name: string should match pattern '^[a-z0-9][a-z0-9._-]{0,62}$', found 'A B'"),
    ("run.device=tpu", "run.device: input should be 'auto', 'cpu' or 'cuda', found 'tpu'"),
    ("training.dtype=fp16", "training.dtype: input should be 'float32' or 'bfloat16', found 'fp16'"),
    ("objective.temperature=-1", "objective.temperature: input should be greater than or equal to 0, found -1"),
    (
        "teacher={kind: pretrained, model: x, revision: main}",
        "teacher.revision: string should match pattern '^[0-9a-f]{40}$', found 'main'",
    ),
    # combinations within one part
    ("student.architecture.num_heads=3", "student.architecture: hidden_size 64 / num_heads 3 must be an even whole number"),
    ("student.architecture.num_kv_heads=4", "student.architecture: num_kv_heads 4 must divide num_heads 2"),
    (
        "student={kind: from_teacher, blocks: [0, 1], last_blocks: 1}",
        "student: blocks are chosen twice; use one of every_nth_block, first_blocks with last_blocks, or blocks",
    ),
    ("student={kind: from_teacher, every_nth_block: 2, first_blocks: 1}", "student: blocks are chosen twice"),
    ("student={kind: from_teacher, blocks: [1, 1]}", "student: blocks must rise, each once, found [1, 1]"),
    ("student={kind: from_teacher, narrower: {}}", "student.narrower: nothing becomes narrower; give hidden_size, num_heads"),
    ("training.warmup_steps=1500", "training: warmup_steps 1500 must be below steps 1500"),
    ("prompts.split={validation: 0.5, test: 0.5}", "prompts.split: validation + test is 1; it must be below 1 to leave training prompts"),
    ("teacher.tokenizer.alphabet=aa", "teacher.tokenizer: alphabet names a character twice; each may stand once"),
    ("answers={num_samples: 2, temperature: 0, max_tokens: 3}", "answers: temperature 0 gives the same answer every time; set num_samples"),
    (
        "objective.soft_weight={kind: piecewise, values: [1, 2], at: []}",
        "objective.soft_weight: at must hold 1 rising shares, one fewer than values",
    ),
    (
        "objective.features={kind: relations, num_heads: 2, blocks: [{student: 1, teacher: 2}, {student: 1, teacher: 3}]}",
        "objective.features: blocks: the student's blocks must rise, each once, found [1, 1]",
    ),
    (
        "objective.features={kind: relations, num_heads: 2, between: [keys, keys]}",
        "objective.features: between: each may stand once, found ['keys', 'keys']",
    ),
    ("objective.features={kind: hidden_states}", "objective.features.source: this field is required and is not there"),
    # combinations across parts
    (
        "objective.features={kind: hidden_states, source: cached}",
        "objective.features.source: cached reads what hidden_states keeps, and there is none; add hidden_states, or set source: live",
    ),
    (
        "objective.features={kind: hidden_states, source: live, weight: 0}",
        "objective.features.weight: 0 at every step teaches nothing; give it a weight, or leave features out",
    ),
    (
        "objective.features={kind: relations, num_heads: 2, blocks: [{student: 3, teacher: 3}]}",
        "objective.features.blocks: the student has no block 3; its blocks are 0 to 2",
    ),
    (
        "objective.features={kind: relations, num_heads: 2, blocks: [{student: 2, teacher: 4}]}",
        "objective.features.blocks: the teacher has no block 4; its blocks are 0 to 3",
    ),
    (
        "objective.features={kind: relations, num_heads: 6}",
        "objective.features.num_heads: 6 relation heads do not divide the 64 columns of the student's queries; use a common divisor",
    ),
    ("hidden_states={blocks: [3, 4]}", "hidden_states.blocks: the teacher has no block 4; its blocks are 0 to 3"),
    ("hidden_states={blocks: [3], width: 129}", "hidden_states.width: 129, and the teacher's states have 128 columns; use at most those"),
    (
        "training.weight_decay=[0.1, 0]",
        "training.weight_decay: must be a number or a schedule, such as {kind: linear, start: 1.0, end: 0.0}, found",
    ),
    ("run.num_processes=33", "run.num_processes: 33, and a step has training.batch_rows: 32 to share out; use at most so many"),
    ("seeds=[0, 0]", "seeds: a seed stands twice; each may stand once"),
    (NO_LABELS, "soft_labels: objective.supervision: soft needs them; choose sampled, topk or dense, or set supervision: hard"),
    ("objective.temperature=1", "objective.temperature: 1 is not among the temperatures stored by soft_labels.sampled: 2"),
    (
        "soft_labels={kind: topk, k: 3, temperatures: [1.0, 4.0]}",
        "objective.temperature: 2 is not among the temperatures stored by soft_labels.topk: 1, 4",
    ),
    (
        "objective.temperature={kind: linear, start: 1, end: 2}",
        "objective.temperature: a ramp is not among the temperatures stored by soft_labels.sampled: 2",
    ),
    ("objective.soft_weight=0", "objective.soft_weight: 0 under supervision: soft trains on hard labels alone; give it a weight"),
    ("objective={supervision: hard}", "evaluation.compare: ablation_hard compares with objective.supervision: soft, and this recipe has"),
    ("evaluation.compare=[teacher]", "gate.rules[0].than: baseline is not in evaluation.compare ['teacher']"),
    ("gate.rules.0.metric=bleu", "gate.rules[0].metric: bleu is not measured by this recipe"),
    (
        "gate.rules=[{kind: floor, metric: nll, minimum: 1}]",
        "gate.rules[0].metric: nll is not measured by this recipe or not for this rule",
    ),
    ("seeds=[0]", "gate.rules[0]: better_than baseline compares two recipes, and one seed says nothing of either"),
    (
        "gate.rules=[{kind: floor, metric: pass_at_1, minimum: 0.5, suite: gsm8k}]",
        "gate.rules[0].suite: gsm8k is not in evaluation.suites; found ['held_out']",
    ),
    (
        "gate.rules=[{kind: ceiling, metric: bytes, maximum: 5, suite: held_out}]",
        "gate.rules[0].suite: bytes is the same on every suite; leave it out",
    ),
    ("prompts.split.test=0", "prompts.split.test: 0 leaves nothing for the held_out suite; use a share above 0, for example 0.1"),
    ("prompts.split.validation=0", "prompts.split.validation: 0 leaves nothing to choose the published seed by"),
    (
        "evaluation.suites=[{kind: held_out, name: a}, {kind: held_out, name: a}]",
        "evaluation.suites: names must differ, found ['a', 'a']",
    ),
    ("curate.gold_rows=0", "evaluation.compare: baseline learns from gold rows, and curate.gold_rows is 0; allow gold rows"),
]


@pytest.mark.parametrize(("override", "line"), WRONG, ids=[override for override, _ in WRONG])
def test_a_mistake_is_one_line(override: str, line: str) -> None:
    message = refusal(override)
    assert "\n" not in message
    assert message.startswith(f"{QUICKSTART}: {line}")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("soft_labels={kind: dense}", "objective.temperature={kind: cosine, start: 0, end: 2}"),
            "objective.temperature: must be above 0 at every step",
        ),
        (("soft_labels={kind: dense}", "objective.temperature=0"), "objective.temperature: must be above 0 at every step"),
        ((SERVER,), "objective.supervision: soft needs a teacher that can score text"),
        (
            (SERVER, NO_LABELS, "objective.supervision=hard", "student={kind: from_teacher, every_nth_block: 2}"),
            "student.kind: from_teacher needs the teacher's weights",
        ),
        ((SERVER, NO_LABELS, "objective.supervision=hard"), "student.kind: config takes the teacher's tokenizer"),
        (
            (SERVER, NO_LABELS, "objective.supervision=hard", "student={kind: pretrained, model: m}", "evaluation.compare=[teacher]"),
            "evaluation.compare: teacher cannot be measured here",
        ),
        (
            (LIVE, "objective.supervision=hard", "evaluation.compare=[baseline]"),
            "objective.features: supervision: hard is cross-entropy alone; set supervision: soft, or leave features out",
        ),
        ((LIVE, "run.compile=true"), "run.compile: objective.features reads inside the student's blocks"),
        (
            (
                "hidden_states={blocks: [1]}",
                "objective.features={kind: hidden_states, source: cached, blocks: [{student: 0, teacher: 1}, {student: 2, teacher: 3}]}",
            ),
            "objective.features.blocks: the teacher's blocks [3] are not among hidden_states.blocks [1]; add them there",
        ),
        (
            ("teacher.architecture.num_kv_heads=1", "objective.features={kind: relations, num_heads: 64, between: [keys]}"),
            "objective.features.num_heads: 64 relation heads do not divide the 32 columns of the teacher's keys",
        ),
        (("run.compile=true", "run.shard_weights=true"), "run: compile with shard_weights is not known to give the same numbers"),
        (("answers=null", "curate.gold_rows=0"), "curate.gold_rows: 0 with answers: null leaves no rows to learn from"),
        (
            ("evaluation.generate=null", "gate.rules=[{kind: floor, metric: pass_at_1, minimum: 0.1}]"),
            "gate.rules[0].metric: pass_at_1 is not measured by this recipe or not for this rule; allowed: agreement",
        ),
    ],
)
def test_combinations_of_several_fields_are_one_line(overrides: tuple[str, ...], line: str) -> None:
    message = refusal(*overrides)
    assert "\n" not in message
    assert message.startswith(f"{QUICKSTART}: {line}")


def test_several_mistakes_are_a_line_each_and_counted() -> None:
    message = refusal("training.steps=0", "name=A", "training.x=1")
    assert [line.split(": ")[1] for line in message.splitlines()] == ["name", "training.steps", "training.x"]
    message = refusal(*(f"training.x{i}=1" for i in range(8)))
    assert len(message.splitlines()) == 6
    assert message.endswith("and 3 more problems")


# ------------------------------------------------------------------------------------------- files and overrides


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty; kd init writes a first recipe"),
        ("[]", "expected fields, each 'name: value', found a list"),
        ("a: 1\nb: {c: 1, c: 2}", "x.yaml:2:11: not valid YAML: key 'c' stands twice"),
        ("a: [", "x.yaml:1:5: not valid YAML: expected the node content"),
        ("1: 2", "x.yaml:1:1: not valid YAML: key 1 is no text; put it in quotes"),
        ("true: 2", "x.yaml:1:1: not valid YAML: key True is no text; put it in quotes"),
        ("? [1]\n: 2", "key [1] is no text"),
        ("a: !!python/object/apply:os.system [x]", "x.yaml:1:4: not valid YAML: could not determine a constructor"),
    ],
)
def test_broken_files_are_refused_with_line_and_column(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    assert line in str(caught.value)


WRONG_FILE = """\
name: mine
task: {answer_marker: "#", verifer: math}
prompts:
  sources:
    - {kind: reasoning_gym, task: chain_sum, num: 5, seed: 0}
    - kind: reasoning_gym
      task: chain_sum
      num: 0
      sead: 1
teacher: {kind: pretrained, model: m}
student: &it
  kind: from_techer
traning: {steps: 3}
"""


def test_a_mistake_has_the_line_it_stands_in(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(WRONG_FILE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert [line.removeprefix(f"{file}").split("; allowed")[0] for line in str(caught.value).splitlines()] == [
        ":2: task.verifier: this field is required and is not there",
        ":2: task.verifer: unknown field; did you mean 'verifier'? allowed: answer_marker, date, kind, system, template, verifier",
        ":8: prompts.sources[1].num: input should be greater than or equal to 1, found 0",
        ":6: prompts.sources[1].seed: this field is required and is not there",
        ":9: prompts.sources[1].sead: unknown field; did you mean 'seed'? allowed: config, kind, num, seed, style, task",
        ": and 2 more problems",
    ]


def test_what_an_override_changed_has_no_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(WRONG_FILE)
    for overrides, line in [
        (["task={verifier: x}", "prompts.sources=[]"], f"{file}: task.verifier: input should be 'math' or 'exact', found 'x'"),
        (["task={verifier: math}", "prompts.sources.1.num=-2"], f"{file}: prompts.sources[1].num: input should be greater"),
        (["student.kind=x", "task.verifier=math"], f"{file}:2: task.verifer: unknown field"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(file, overrides)
        assert line in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read \(No such file or directory\); pass the path of a recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training", "--set 'training': expected path=value, for example --set training.steps=300"),
        ("=3", "--set '=3': expected path=value"),
        (".=3", "--set '.=3': expected path=value"),
        ("training..steps=3", "--set 'training..steps=3': expected path=value"),
        ("seeds.\u00b2=3", "--set seeds.\u00b2=3: seeds.\u00b2 is a list of 5; use a number from 0 to 4"),
        ("prompts.sources.3.num=1", "--set prompts.sources.3.num=1: prompts.sources.3 is a list of 1; use a number from 0 to 0"),
        ("name.x=1", "--set name.x=1: name is the value 'quickstart' and has no fields below it"),
        ("training.steps=[1", "--set training.steps:1:3: not valid YAML: expected ',' or ']'"),
    ],
)
def test_bad_overrides_are_one_line(override: str, line: str) -> None:
    message = refusal(override)
    assert "\n" not in message
    assert message.startswith(line)


def test_overrides_reach_every_place() -> None:
    recipe = load(
        "training.steps=7", "training.warmup_steps=0", "prompts.sources.0.num=11", "run.s3.region=eu", "answers=null", "run.tracking="
    )
    assert (recipe.training.steps, recipe.prompts.sources[0].num, recipe.run.s3.region) == (7, 11, "eu")
    assert (recipe.answers, recipe.run.tracking) == (None, None)


@pytest.mark.parametrize(
    "text", ["####", "#", "# the answer", "Use # for the total", "a: b", "- a", "|", "*", "&x", "!!int 3", "no", "1:30"]
)
def test_an_override_s_text_is_taken_whole(text: str) -> None:
    recipe = load(f"task.answer_marker={text}", f"task.system= {text} ", f"description='{text}'")
    assert (recipe.task.answer_marker, recipe.task.system, recipe.description) == (text, text, text)


def test_a_long_value_is_cut_where_it_is_shown() -> None:
    message = refusal(f"training.steps={'x' * 5000}")
    assert len(message) < 600
    assert message.endswith("... (5,002 characters)")


SCALARS = st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False) | st.sampled_from(["", "x", "soft", "sampled", "é"])
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from(["kind", "value", "x"]), SCALARS, max_size=2)


def places(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [place for key, value in items for place in places(value, (*path, key))]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_one_damaged_place_is_a_recipe_or_a_refusal_that_names_it(data: st.DataObject) -> None:
    plain = yaml.safe_load(QUICKSTART.read_text())
    place = data.draw(st.sampled_from(places(plain)))
    here = plain
    for part in place[:-1]:
        here = here[part]
    here[place[-1]] = data.draw(VALUES)
    try:
        message = f"o: {parse_recipe(plain, origin='o').name}"
    except RecipeError as error:
        message = str(error)
    assert message
    assert all(line.startswith("o: ") for line in message.splitlines())


# ------------------------------------------------------------------------------------------- meaning


def test_a_number_is_a_constant_schedule() -> None:
    objective = load("soft_labels={kind: dense}", "objective.temperature=3").objective
    assert schedule_values(objective.temperature) == (3.0,)
    assert (
        schedule_values(load("soft_labels={kind: dense}", "objective.temperature={kind: linear, start: 1, end: 2}").objective.temperature)
        is None
    )


def test_dense_labels_allow_every_temperature() -> None:
    assert isinstance(load("soft_labels={kind: dense}", "objective.temperature={kind: cosine, start: 4, end: 1}").soft_labels, Dense)


def test_compared_models_differ_in_one_field() -> None:
    """Trap 27."""
    recipe = load()
    assert recipe.arms() == ARMS
    plain = recipe.model_dump()
    for arm, supervision in (("baseline", "gold"), ("ablation_hard", "hard")):
        other = recipe.arm(arm).model_dump()
        assert other["objective"].pop("supervision") == supervision
        changed = {name for name in plain if other[name] != plain[name]}
        assert changed == {"objective"}
        assert other["objective"] == {k: v for k, v in plain["objective"].items() if k != "supervision"}
    assert recipe.arm("student") is recipe
    assert load("evaluation.compare=[baseline]").arms() == ("student", "baseline")


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().training.steps = 3  # type: ignore[misc]


def recipe_models(model: type[BaseModel]) -> set[type[BaseModel]]:
    def leaves(annotation: Any) -> set[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return recipe_models(annotation)
        return {leaf for inner in get_args(annotation) for leaf in leaves(inner)}

    return {model}.union(*(leaves(field.annotation) for field in model.model_fields.values()))


def test_every_field_is_described_and_every_model_is_closed() -> None:
    models = recipe_models(Recipe)
    assert len(models) > 25
    for model in models:
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["frozen"]
        missing = [name for name, field in model.model_fields.items() if not field.description and name not in ("kind", "revision")]
        assert not missing, f"{model.__name__}: {missing}"


def test_the_recipe_needs_no_torch() -> None:
    code = "import sys, kd_core.recipe.files; sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
