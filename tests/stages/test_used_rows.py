"""Rows that are too long are left out, counted and said; too few that are not stop a run before the teacher reads any."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_core.artifacts import find, read_bytes
from kd_core.errors import TrainingError
from kd_core.planning.plan import make_plan
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SIZE = "{hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 32, max_positions: 64}"
TRAINING = "{steps: 4, batch_rows: 4, learning_rate: 0.003, max_tokens: 32}"
OVERRIDES = (
    "seeds=[0]",
    "answers=null",
    f"teacher.architecture={SIZE}",
    f"student.architecture={SIZE}",
    f"teacher.training={TRAINING}",
    f"training={TRAINING}",
    "prompts.split={validation: 0.0, test: 0.1}",
    "evaluation.generate=null",
    "evaluation.compare=[]",
    "gate.rules=[{kind: ceiling, metric: parameter_ratio, maximum: 1}]",
    "run={threads: 1, device: cpu}",
)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A quarter of its gold rows has about 27 tokens, the others 13."""
    rows = [(f"{a}+{b}=", "1" * (21 if a % 4 == 0 else 7)) for a in range(10, 30) for b in range(1, 10)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    sources = f'[{{kind: file, path: {tmp_path / "q.jsonl"}, prompt: "{{q}}", gold: "{{a}}", reference: "{{a}}"}}]'

    def make(*overrides: str) -> Recipe:
        return load_recipe(QUICKSTART, [f"prompts.sources={sources}", f"teacher.sources={sources}", *OVERRIDES, *overrides])

    return make


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def _run(recipe: Recipe, store: LocalStore, *, last: str) -> None:
    for node in build_graph(recipe, store).values():
        run_node(recipe, build_graph(recipe, store), node.name, store=store, tick=silent, extra={})
        if node.name == last:
            return


def test_a_run_stops_where_too_few_rows_are_short_enough(recipe, store: LocalStore) -> None:
    short = recipe("training.max_tokens=20")
    (note,) = [note for note in make_plan(short, store).notes if note.startswith("rows: ")]
    assert "rows are left out, longer than training.max_tokens = 20, by their gold answers" in note
    assert note.endswith("a run stops there: training.least_rows_share is 90%")
    with pytest.raises(TrainingError, match=r"rows are left out, longer than training\.max_tokens = 20; training\.least_rows_share asks"):
        _run(short, store, last="soft_labels")
    assert not [info for info in store.list("rows/soft_labels/") if "/shards/" in info.key], "the teacher has read nothing"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("teacher.training.max_tokens=20", r"longer than teacher\.training\.max_tokens = 20; teacher\.training\.least_rows_share asks"),
        ("teacher.architecture.max_positions=16", r"longer than the teacher's positions = 16; teacher\.training"),
    ],
)
def test_a_teacher_learns_from_enough_rows_too(recipe, store: LocalStore, override: str, line: str) -> None:
    with pytest.raises(TrainingError, match=line):
        _run(recipe(override), store, last="teacher")


def test_what_is_left_out_is_in_record_plan_and_report(recipe, store: LocalStore) -> None:
    allowed = recipe("student.architecture.max_positions=20", "training.least_rows_share=0.5")
    _run(allowed, store, last="report")
    nodes = build_graph(allowed, store)
    record = find(store, "train", nodes["student.0"].fingerprint)
    assert record is not None
    used = record.summary["training"]["used_rows"]
    assert 0.7 < used["used"] / used["rows"] < 0.8
    assert used["limit"] == {"tokens": 20, "by": "the student's positions"}
    (note,) = [note for note in make_plan(allowed, store).notes if note.startswith("rows: ")]
    assert note.startswith(f"rows: {used['used']} of {used['rows']} rows (")
    report = find(store, "report", nodes["report"].fingerprint)
    assert report is not None
    counts = json.loads(read_bytes(store, report, "report.json"))["counts"]
    assert counts["Rows learnt from"]["rows left out, longer than the student's positions = 20"] == used["rows"] - used["used"] > 0
    evaluated = find(store, "evaluate", nodes["evaluate.student"].fingerprint)
    assert evaluated is not None
    assert counts["Items that may need more than a model's positions"] == {"student": evaluated.summary["items_beyond_positions"]}
    with pytest.raises(TrainingError, match=r"least_rows_share asks for 90\.0%"):  # the students are hits, the report is not
        _run(recipe("student.architecture.max_positions=20"), store, last="report")
