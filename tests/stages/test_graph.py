"""Fingerprints: each field of the recipe moves exactly the stages downstream of it, and `run` moves none.

Every leaf of three recipes is changed, one at a time, and the moved nodes are compared with the table below. A walk over
the recipe's types proves that the three recipes hold every field there is.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from kd_core.artifacts import Artifact, Record, publish
from kd_core.errors import ArtifactError
from kd_core.ledger import Entry, append, current
from kd_core.recipe import HiddenStates, Recipe, RelationFeatures, Vocabulary
from kd_core.recipe.files import dump_recipe, load_recipe, parse_recipe
from kd_core.stages.graph import Graph, Node, build_graph, find_node, open_node, selected_student
from kd_core.stages.order import Pending, run_graph
from kd_core.store import LocalStore
from kd_core.summaries import TrainSummary, plain
from tests.standins import SUMMARIES

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"

# ---------------------------------------------------------------------------------------------- the table

RECORDED = {"report", "publish"}  # the report shows the whole recipe
VERDICT = {"gate"} | RECORDED
STUDENT = {"student", "evaluate.student"} | VERDICT
LEARNT = {"student", "baseline", "ablation_hard", "evaluate.student", "evaluate.baseline", "evaluate.ablation_hard"} | VERDICT
EVALUATED = {"evaluate.teacher", "evaluate.student", "evaluate.baseline", "evaluate.ablation_hard"} | VERDICT
FROM_CURATE = {"curate", "vocabulary", "soft_labels", "hidden_states"} | LEARNT
FROM_ANSWERS = {"answers"} | FROM_CURATE
FROM_PROMPTS = {"prompts", "evaluate.teacher"} | FROM_ANSWERS
FROM_TEACHER = {"teacher", "evaluate.teacher"} | FROM_ANSWERS
REFUSED = {"soft_labels", "hidden_states"} | STUDENT
ALL = FROM_PROMPTS | FROM_TEACHER

COMMON = {
    "name": RECORDED,
    "description": RECORDED,
    "seeds": LEARNT,  # a seed more; another first seed is a test of its own
    "task": FROM_ANSWERS | EVALUATED,
    "task.verifier": FROM_CURATE | EVALUATED,
    "task.answer_marker": FROM_PROMPTS,
    "prompts": FROM_PROMPTS,
    "teacher": FROM_TEACHER,
    "answers": FROM_ANSWERS,
    "curate": FROM_CURATE,
    "curate.leave_out_classes": FROM_CURATE | EVALUATED,  # what recall of the unseen is measured on
    "soft_labels": {"soft_labels"} | STUDENT,
    "hidden_states": {"hidden_states"} | RECORDED,  # where no objective reads them
    "student": LEARNT,
    "student.vocabulary": {"vocabulary"} | LEARNT,
    "objective": STUDENT,
    "objective.supervision": {"soft_labels"} | STUDENT,
    "training": LEARNT,
    "training.least_rows_share": RECORDED,  # a condition
    "evaluation.suites": EVALUATED,
    "evaluation.generate": EVALUATED,
    "evaluation.confidence": VERDICT,
    "gate": VERDICT,
    "publish": RECORDED,
}
TABLES = {
    "trained": {
        **COMMON,
        "task": FROM_TEACHER,  # the teacher is trained on these tokens,
        "task.answer_marker": ALL,
        "teacher.training.least_rows_share": RECORDED,
        "prompts.split": ALL,  # and not on what is held out
        "hidden_states": {"hidden_states"} | STUDENT,  # cached features read them
        "prompts.max_characters": ALL,
        **{f"evaluation.suites.{i}.name": ALL for i in (1, 2, 3)},  # a benchmark is kept apart from all training
        **{f"evaluation.suites.{i}.source": ALL for i in (1, 2, 3)},
        "evaluation.compare": {"ablation_hard", "evaluate.ablation_hard"} | VERDICT,  # the last one is dropped
        "soft_labels.max_refused_rows": REFUSED | {"ablation_hard", "evaluate.ablation_hard"},  # the same rows for both
    },
    "pretrained": {
        **COMMON,
        "teacher.revision": RECORDED,  # a local directory is its content
        "soft_labels.max_refused_rows": REFUSED,
        "evaluation.compare": {"evaluate.teacher"} | VERDICT,
    },
    "server": {
        **COMMON,
        "teacher.price_per_million_tokens": RECORDED,
        "task.date": FROM_CURATE | EVALUATED,  # the server words its prompts itself
        "soft_labels": RECORDED,  # supervision: hard uses none,
        "objective": RECORDED,  # nor any weight
        "student": FROM_CURATE,  # its tokenizer counts the tokens of text
        "student.adapter": LEARNT,
        "student.vocabulary": {"vocabulary"} | LEARNT,
        "student.vocabulary.least_kept_mass": RECORDED,  # measured on soft labels, and there are none
        "evaluation.compare": {"baseline", "evaluate.baseline"} | VERDICT,
    },
}


def _files(folder: Path) -> Path:
    """Data and model files, and other ones to change to."""
    folder.mkdir()
    for name, number in (("a", 1), ("b", 2)):
        (folder / f"{name}.jsonl").write_text(json.dumps({"q": f"{number}+1=", "a": f"#{number + 1}"}) + "\n")
        (folder / f"model-{name}").mkdir()
        (folder / f"model-{name}" / "config.json").write_text(json.dumps({"number": number}))
    return folder


def _sources(folder: Path) -> list[dict[str, Any]]:
    columns = {"prompt": "{q}", "gold": "{a}", "reference": "{a}"}
    return [
        {"kind": "reasoning_gym", "task": "chain_sum", "num": 50, "seed": 1, "config": {"max_terms": 4}},
        {"kind": "file", "path": str(folder / "a.jsonl"), **columns},
        {"kind": "dataset", "id": "openai/gsm8k", "revision": REVISION, "split": "train", **columns},
    ]


def _recipes(folder: Path) -> dict[str, Recipe]:
    sources = _sources(folder)
    architecture = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    training = {"steps": 10, "batch_rows": 4, "learning_rate": 0.001}
    held_out = {"kind": "held_out", "name": "held_out"}
    adapter = {"kind": "lora", "rank": 2, "alpha": 4}
    generate = {"num_samples": 2, "temperature": 0.5, "max_tokens": 8}
    trained = {
        "name": "trained",
        "seeds": [0, 1],
        "task": {"template": "plain", "answer_marker": "#", "verifier": "math"},
        "prompts": {"sources": sources, "split": {"validation": 0.1, "test": 0.1}},
        "teacher": {
            "kind": "trained",
            "sources": sources,
            "tokenizer": {"kind": "characters", "alphabet": "0123456789+=#"},
            "architecture": architecture,
            "training": training,
        },
        "answers": generate,
        "soft_labels": {"kind": "sampled", "num_draws": 5, "temperature": 1.0},
        "hidden_states": {"blocks": [0, 1], "width": 8, "reduce": "project"},
        "student": {"kind": "config", "architecture": architecture},
        "objective": {
            "supervision": "soft",
            "soft_weight": 1.0,
            "features": {
                "kind": "hidden_states",
                "source": "cached",
                "blocks": [{"student": 0, "teacher": 0}, {"student": 1, "teacher": 1}],
            },
        },
        "training": training,
        "evaluation": {
            "suites": [held_out, *({"kind": "source", "name": f"suite{i}", "source": source} for i, source in enumerate(sources))],
            "generate": generate,
            "compare": ["teacher", "baseline", "ablation_hard"],
        },
        "gate": {
            "rules": [
                {"kind": "better_than", "metric": "pass_at_1", "than": "baseline"},
                {"kind": "not_worse_than_champion", "metric": "pass_at_1", "margin": 0.1},
                {"kind": "floor", "metric": "pass_at_1", "minimum": 0.1},
                {"kind": "ceiling", "metric": "bytes", "maximum": 1e9},
            ]
        },
        "publish": "model",
    }
    pretrained = {
        **trained,
        "name": "pretrained",
        "teacher": {"kind": "pretrained", "model": str(folder / "model-a")},
        "soft_labels": {"kind": "topk", "k": 5, "temperatures": [1.0, 2.0]},
        "training": {**training, "learning_rate_schedule": {"kind": "warmup_stable_decay"}},
        "student": {"kind": "from_teacher", "every_nth_block": 2, "narrower": {"hidden_size": 8}, "adapter": adapter},
        "objective": {
            "supervision": "soft",
            "hard_weight": {"kind": "linear", "start": 1.0, "end": 0.0},
            "soft_weight": {"kind": "cosine", "start": 0.5, "end": 1.0},
            "temperature": {"kind": "piecewise", "values": [2.0, 1.0], "at": [0.5]},
            "divergence": {"kind": "jsd", "beta": 0.3},
            "features": {"kind": "relations", "num_heads": 2, "blocks": [{"student": 0, "teacher": 1}], "weight": 0.5},
        },
        "evaluation": {"suites": [held_out], "generate": generate, "compare": ["teacher"]},
        "gate": {"rules": [{"kind": "floor", "metric": "pass_at_1", "minimum": 0.1}]},
    }
    server = {
        **pretrained,
        "name": "server",
        "teacher": {"kind": "server", "model": "big", "revision": "2026-01"},
        "student": {"kind": "pretrained", "model": "org/small", "revision": REVISION, "adapter": adapter, "vocabulary": {"keep": "data"}},
        "soft_labels": {"kind": "dense"},
        "training": {**training, "learning_rate_schedule": {"kind": "plateau"}, "validate_every_steps": 5},
        "hidden_states": None,
        "objective": {"supervision": "hard", "divergence": {"kind": "skew_kl", "alpha": 0.2}},
        "evaluation": {"suites": [held_out], "generate": generate, "compare": ["baseline"]},
    }
    return {data["name"]: parse_recipe(data, origin="test") for data in (trained, pretrained, server)}


# ---------------------------------------------------------------------------------------------- changing one leaf

_ADDED: dict[tuple[str, str], Any] = {  # values for fields whose type alone does not say what else is allowed
    ("DatasetSource", "config"): "main",
    ("DatasetSource", "messages"): "turns",
    ("FileSource", "messages"): "turns",
    ("DatasetSource", "revision"): REVISION[::-1],
    ("PretrainedStudent", "revision"): REVISION[::-1],
    ("PretrainedTeacher", "revision"): REVISION[::-1],
    ("ReasoningGymSource", "config"): {"max_terms": 3},
    ("Recipe", "hidden_states"): HiddenStates(blocks=(0,)),
    ("Objective", "features"): RelationFeatures(kind="relations", num_heads=2),
    ("Recipe", "seeds"): (0, 1, 2),
    ("StudentFromConfig", "vocabulary"): Vocabulary(keep="data"),
    ("StudentFromTeacher", "blocks"): (0, 1),
    ("StudentFromTeacher", "vocabulary"): Vocabulary(keep="data"),
    ("Task", "system"): "be brief",
    ("Task", "date"): datetime.date(2026, 1, 1),
    ("TopK", "temperatures"): (1.0, 2.0, 4.0),
    **{(rule, "suite"): "held_out" for rule in ("BetterThan", "NotWorseThanChampion", "Floor", "Ceiling")},
    **{(training, "adam_betas"): (0.8, 0.9) for training in ("Training", "StudentTraining")},
    **{(training, "clip_norm"): None for training in ("Training", "StudentTraining")},
    **{(training, "ema_decay"): 0.99 for training in ("Training", "StudentTraining")},
    ("StudentTraining", "epochs"): 2.5,
    ("Piecewise", "values"): (2.0, 3.0),
    ("Curate", "leave_out_classes"): ("a",),
    ("Piecewise", "at"): (0.25,),
    ("S3Options", "endpoint"): "http://127.0.0.1:1",
    ("Run", "teacher_url"): "http://127.0.0.1:2/v1",
    ("Run", "tracking"): "sqlite:///elsewhere.db",
    ("Run", "score_tokens_per_second"): 1000.0,
    ("Run", "price_per_hour"): 2.5,
    ("Run", "price_per_gb_month"): 0.02,
    ("Run", "price_per_thousand_requests"): 0.005,
    ("ServerTeacher", "price_per_million_tokens"): 1.5,
}


def _other(model: BaseModel, name: str, value: Any) -> Any:
    options = get_args(type(model).model_fields[name].annotation)
    if get_origin(type(model).model_fields[name].annotation) is Literal:
        return next(option for option in options if option != value)
    if (type(model).__name__, name) in _ADDED:
        return _ADDED[type(model).__name__, name]
    if name in ("path", "model") and Path(value).exists():
        return value.replace("a.jsonl", "b.jsonl").replace("model-a", "model-b")
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.01
        case str():
            return value + "x"
        case tuple():
            return value[:-1]
        case None:
            assert int in options, f"{type(model).__name__}.{name}: say in _ADDED what else it can be"
            return 3
    raise AssertionError(f"{type(model).__name__}.{name}: {value!r}")


def _is_tag(model: type[BaseModel], name: str) -> bool:
    annotation = model.model_fields[name].annotation
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _leaves(model: BaseModel, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], BaseModel]]:
    """(path, the model that holds the leaf) of everything below; tags with one value are no choice."""
    for name in type(model).model_fields:
        value, here = getattr(model, name), (*path, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, here)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for i, item in enumerate(value):
                yield from _leaves(item, (*here, i))
        elif not _is_tag(type(model), name):
            yield here, model


def _replace(here: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with one leaf changed; not validated: what one field alone moves is the question, not what goes with what."""
    if not path:
        return value
    if isinstance(here, tuple):
        return tuple(_replace(item, path[1:], value) if i == path[0] else item for i, item in enumerate(here))
    name = str(path[0])
    return here.model_copy(update={name: _replace(getattr(here, name), path[1:], value)})


def _change(recipe: Recipe, path: tuple[str | int, ...], holder: BaseModel) -> Recipe:
    name = str(path[-1])
    return _replace(recipe, path, _other(holder, name, getattr(holder, name)))


def _fingerprints(recipe: Recipe, store: LocalStore) -> dict[str, list[str]]:
    """Fingerprints by stage and model: the seeds of one model together."""
    found: dict[str, list[str]] = {}
    for node in build_graph(recipe, store).values():
        found.setdefault(node.group if node.stage == "train" else node.name, []).append(node.fingerprint)
    return found


def _differing(old: dict[str, list[str]], new: dict[str, list[str]]) -> set[str]:
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def _moved(before: Recipe, after: Recipe, store: LocalStore) -> set[str]:
    return _differing(_fingerprints(before, store), _fingerprints(after, store))


def _rule(table: dict[str, set[str]], path: tuple[str | int, ...]) -> set[str]:
    """The longest prefix of the path that the table has."""
    parts = [str(part) for part in path]
    return next(rule for end in range(len(parts), 0, -1) if (rule := table.get(".".join(parts[:end]))) is not None)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, Recipe]:
    return _recipes(_files(tmp_path / "data"))


@pytest.mark.parametrize("name", TABLES)
def test_a_field_moves_exactly_what_is_downstream_of_it(name: str, recipes: dict[str, Recipe], store: LocalStore) -> None:
    recipe = recipes[name]
    leaves = [(path, holder) for path, holder in _leaves(recipe) if path[0] != "run"]
    assert len(leaves) >= {"trained": 110, "pretrained": 70, "server": 65}[name]
    before, wrong = _fingerprints(recipe, store), {}
    for path, holder in leaves:
        after = _fingerprints(_change(recipe, path, holder), store)
        moved, expected = _differing(before, after), _rule(TABLES[name], path) & (before.keys() | after.keys())
        if moved != expected:
            wrong[".".join(map(str, path))] = {"too many": moved - expected, "too few": expected - moved}
    assert wrong == {}


def _reachable(annotation: Any) -> Iterator[tuple[str, str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            below = list(_reachable(field.annotation))
            yield from below
            if not below and not _is_tag(annotation, name) and name != "run":
                yield annotation.__name__, name
    else:
        for inner in get_args(annotation):
            yield from _reachable(inner)


_CLASSES = {"ClassificationTask", "FolderSource", "NewClassifier", "ScikitLearnSource", "TrainedClassifier", "WordPieces"}
"""Types of recipes of classes, whose fields `test_moves` changes."""


def test_the_three_recipes_hold_every_field_of_identity(recipes: dict[str, Recipe]) -> None:
    leaves = [leaf for recipe in recipes.values() for leaf in _leaves(recipe) if leaf[0][0] != "run"]
    changed = {(type(holder).__name__, str(path[-1])) for path, holder in leaves}
    every = {found for name, field in Recipe.model_fields.items() if name != "run" for found in _reachable(field.annotation)}
    every = {(model, name) for model, name in every if model not in _CLASSES}
    every |= {("Recipe", name) for name, field in Recipe.model_fields.items() if not list(_reachable(field.annotation))}
    absent = {
        ("Recipe", "hidden_states"),
        ("Objective", "features"),
        *((f"StudentFrom{kind}", "vocabulary") for kind in ("Config", "Teacher")),
    }
    every |= absent  # in some of them: having one at all is a change of its own
    assert every == changed
    assert len(every) >= 90


@pytest.mark.parametrize("name", TABLES)
def test_run_is_no_part_of_identity(name: str, recipes: dict[str, Recipe], store: LocalStore) -> None:
    """A publication alone asks for its place: another registry has not had it yet."""
    recipe = recipes[name]
    leaves = [(path, holder) for path, holder in _leaves(recipe) if path[0] == "run"]
    assert {path[1] for path, _ in leaves} == set(type(recipe.run).model_fields)
    moved = {".".join(map(str, path)): _moved(recipe, _change(recipe, path, holder), store) for path, holder in leaves}
    assert {path: names for path, names in moved.items() if names} == {"run.tracking": {"publish"}}


# ---------------------------------------------------------------------------------------------- shapes of the graph


def test_the_first_seed_is_the_teachers_and_its_answers_too(recipes: dict[str, Recipe], store: LocalStore) -> None:
    recipe = recipes["trained"]
    assert _moved(recipe, recipe.model_copy(update={"seeds": (2, 1)}), store) == FROM_TEACHER - {"vocabulary"}
    before, after = build_graph(recipe, store), build_graph(recipe.model_copy(update={"seeds": (0, 1, 2)}), store)
    assert all(before[f"{arm}.{seed}"] == after[f"{arm}.{seed}"] for arm in ("student", "baseline", "ablation_hard") for seed in (0, 1))


def test_another_compared_model_leaves_the_others_alone(recipes: dict[str, Recipe], store: LocalStore) -> None:
    recipe = recipes["pretrained"]
    more = _replace(recipe, ("evaluation", "compare"), ("teacher", "baseline"))
    assert _moved(recipe, more, store) == {"baseline", "evaluate.baseline"} | VERDICT


def test_a_recipe_without_answers_or_soft_labels_has_no_such_nodes(recipes: dict[str, Recipe], store: LocalStore) -> None:
    gold = recipes["trained"].model_copy(update={"answers": None})
    assert {"answers"} == set(build_graph(recipes["trained"], store)) - set(build_graph(gold, store))
    assert "soft_labels" not in build_graph(recipes["server"], store)


def test_upstream_nodes_come_first(recipes: dict[str, Recipe], store: LocalStore) -> None:
    for recipe in recipes.values():
        nodes = build_graph(recipe, store)
        order = list(nodes)
        assert all(order.index(above) < order.index(node.name) for node in nodes.values() for above in node.upstream.values())


def test_files_are_their_content_wherever_they_are(
    tmp_path: Path, recipes: dict[str, Recipe], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere" / "data"
    shutil.copytree(tmp_path / "data", elsewhere)
    for name, moved in _recipes(elsewhere).items():
        assert _moved(recipes[name], moved, store) <= RECORDED, "the report alone shows paths"
    relative = _recipes_relative(recipes["trained"], tmp_path)
    monkeypatch.chdir(tmp_path)
    here = _fingerprints(relative, store)
    monkeypatch.chdir(elsewhere.parent)
    assert _fingerprints(relative, store) == here
    (elsewhere / "a.jsonl").write_text(json.dumps({"q": "3+1=", "a": "#4"}) + "\n")
    assert _differing(_fingerprints(relative, store), here) == ALL - {"vocabulary"}


def _recipes_relative(recipe: Recipe, root: Path) -> Recipe:
    data = json.loads(json.dumps(recipe.model_dump(mode="json")).replace(f"{root}/", ""))
    return parse_recipe(data, origin="test")


def test_another_process_finds_the_same_fingerprints_without_torch(tmp_path: Path, recipes: dict[str, Recipe], store: LocalStore) -> None:
    recipe = recipes["trained"]
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    code = (
        "import json, sys\n"
        "from kd_core.recipe.files import load_recipe\n"
        "from kd_core.stages.graph import build_graph\n"
        "from kd_core.store import LocalStore\n"
        "from pathlib import Path\n"
        "nodes = build_graph(load_recipe(sys.argv[1]), LocalStore(Path(sys.argv[2])))\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps({name: node.fingerprint for name, node in nodes.items()}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml"), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == {name: node.fingerprint for name, node in build_graph(recipe, store).items()}


def test_every_recipe_of_the_project_has_a_graph(store: LocalStore) -> None:
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert "quickstart.yaml" in [file.name for file in files]
    for file in files:
        nodes = build_graph(load_recipe(file), store)
        assert len({node.fingerprint for node in nodes.values()}) == len(nodes) > 8


# ---------------------------------------------------------------------------------------------- the champion


@dataclass(frozen=True)
class _Computed:
    artifact: Artifact

    def result(self) -> Artifact:
        return self.artifact


def _compute(recipe: Recipe, store: LocalStore, folder: Path, *, losses: tuple[float | None, ...] = (0.5, 0.25)) -> list[str]:
    """Run the graph with a stand-in for each stage; publishing makes the selected student champion. Returns what was computed."""
    computed = []

    def stand_in(nodes: Graph, node: Node, above: Sequence[Pending]) -> Pending:
        assert all(find_node(store, nodes[upstream]) is not None for upstream in node.upstream.values())
        record = find_node(store, node)
        if record is None:
            computed.append(node.name)
            loss = losses[int(node.name[-1])] if node.stage == "train" else None
            if node.stage == "publish":
                _promote(recipe, store)
            directory = folder / node.fingerprint
            directory.mkdir()
            (directory / "file").write_text(node.fingerprint)
            summary = SUMMARIES[node.stage]
            if isinstance(summary, TrainSummary):
                summary = replace(summary, training=replace(summary.training, validation_nll=loss))
            record = publish(
                store, directory, stage=node.stage, fp=node.fingerprint, identity=node.identity, upstream=node.above, summary=plain(summary)
            )
        return _Computed(Artifact(node.stage, node.fingerprint, record.digest))

    run_graph(recipe, store, stand_in)
    return computed


def _promote(recipe: Recipe, store: LocalStore) -> None:
    student, holder = selected_student(recipe, store, build_graph(recipe, store)), current(store, recipe.publish)
    assert student is not None
    _append(recipe, store, student, None if holder is None else holder.number)


def _append(recipe: Recipe, store: LocalStore, record: Record, previous: int | None) -> None:
    artifact = Artifact(record.stage, record.fingerprint, record.digest)
    append(store, recipe.publish, Entry(recipe.publish, "promote", artifact, ("test",), previous, 0))


def test_its_own_promotion_does_not_move_a_students_gate(tmp_path: Path, recipes: dict[str, Recipe], store: LocalStore) -> None:
    first = recipes["trained"]
    second = _replace(first, ("objective", "temperature", "value"), 2.0)
    assert set(_compute(first, store, tmp_path)) == set(build_graph(first, store))
    assert _compute(first, store, tmp_path) == []
    before = build_graph(second, store)
    computed = _compute(second, store, tmp_path)
    holder = current(store, first.publish)
    assert holder is not None
    assert (holder.number, holder.artifact.fingerprint) == (2, before["student.1"].fingerprint)
    assert "evaluate.champion" in computed
    assert build_graph(second, store) == before, "it still faces the champion that it replaced"
    assert _compute(second, store, tmp_path) == []


def test_another_champion_moves_the_verdict_only(tmp_path: Path, recipes: dict[str, Recipe], store: LocalStore) -> None:
    recipe = recipes["trained"]
    _compute(recipe, store, tmp_path)
    before = _fingerprints(recipe, store)
    _append(recipe, store, open_node(store, build_graph(recipe, store)["baseline.0"]), 1)
    after = _fingerprints(recipe, store)
    assert _differing(before, after) == {"evaluate.champion"} | VERDICT


def test_the_student_with_the_least_validation_loss_is_selected(tmp_path: Path, recipes: dict[str, Recipe]) -> None:
    recipe = recipes["server"]
    for losses, seed in (((0.5, 0.25), 1), ((0.25, 0.5), 0), ((0.5, 0.5), 0), ((None, None), 0)):
        folder = tmp_path / f"{losses}"
        folder.mkdir()
        store = LocalStore(folder / "store")
        nodes = build_graph(recipe, store)
        assert selected_student(recipe, store, nodes) is None
        with pytest.raises(ArtifactError, match=r"^student\.0 [0-9a-f]{32} is not in .*; run the recipe to compute it$"):
            open_node(store, nodes["student.0"])
        _compute(recipe, store, folder, losses=losses)
        chosen = selected_student(recipe, store, nodes)
        assert chosen is not None
        assert chosen.fingerprint == nodes[f"student.{seed}"].fingerprint
