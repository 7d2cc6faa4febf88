"""What stages hand on comes back from a record as it was, or is refused by the name of its field."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kd_core.artifacts import Record, find, record_keys
from kd_core.errors import ArtifactError
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.run import STAGES
from kd_core.store import LocalStore
from kd_core.summaries import (
    ServerIdentity,
    ShardedRows,
    TeacherSummary,
    TrainSummary,
    of,
    parse,
    plain,
    shards_of,
)
from tests.standins import SUMMARIES

if TYPE_CHECKING:
    from tests.conftest import Finished

ROOT = Path(__file__).parents[1]
FP = "f" * 32


def record(stage: str, summary: dict[str, Any]) -> Record:
    return Record(stage, FP, {}, {}, (), summary, 0.0)


def test_there_is_a_summary_of_each_stage() -> None:
    assert set(SUMMARIES) == {*STAGES, "publish"}


@pytest.mark.parametrize("stage", SUMMARIES)
def test_a_summary_comes_back_as_it_was(stage: str) -> None:
    assert parse(record(stage, plain(SUMMARIES[stage]))) == SUMMARIES[stage]


def test_a_servers_identity_comes_back() -> None:
    server = TeacherSummary(ServerIdentity("server", "big", "2025"), None, None, None, counts={}, training=None)
    assert of(record("teacher", plain(server)), TeacherSummary) == server


def _paths(summary: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of a dataclass and of those inside it."""
    found = [(*prefix, field.name) for field in fields(summary)]
    for field in fields(summary):
        if is_dataclass(value := getattr(summary, field.name)):
            found += _paths(value, (*prefix, field.name))
    return found


def _part(summary: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        summary = summary[name]
    return summary


@pytest.mark.parametrize("stage", SUMMARIES)
def test_a_missing_field_and_an_unknown_one_are_refused_by_name(stage: str) -> None:
    for path in _paths(SUMMARIES[stage]):
        less, more = plain(SUMMARIES[stage]), plain(SUMMARIES[stage])
        _part(less, path[:-1]).pop(path[-1])
        _part(more, path[:-1])["surplus"] = 1
        what = "'teacher' of its summary is wrong: .*'engine'" if path[-1] == "engine" else rf"'[\w.]*{path[-1]}' of its summary is missing"
        with pytest.raises(ArtifactError, match=rf"^{stage} {FP}: field {what}"):
            parse(record(stage, less))
        with pytest.raises(ArtifactError, match=rf"^{stage} {FP}: field '[\w.]*surplus' of its summary is unknown"):
            parse(record(stage, more))


def test_nothing_is_converted() -> None:
    changed = {**plain(SUMMARIES["train"]), "parameters": "50"}
    with pytest.raises(ArtifactError, match=r"field 'parameters' of its summary is wrong: .*integer.*; another version of this code wrote"):
        parse(record("train", changed))


def test_another_stage_than_the_one_expected_is_refused() -> None:
    with pytest.raises(ArtifactError, match=rf"^gate {FP}: expected a TrainSummary, and that stage has a GateSummary"):
        of(record("gate", plain(SUMMARIES["gate"])), TrainSummary)
    with pytest.raises(ArtifactError, match=rf"^grade {FP}: no stage of this name"):
        parse(record("grade", {}))


def test_rows_in_shards_are_those_of_three_stages() -> None:
    found = {stage: shards_of(record(stage, plain(summary))) for stage, summary in SUMMARIES.items()}
    assert {stage for stage, shards in found.items() if isinstance(shards, ShardedRows)} == {"answers", "soft_labels", "hidden_states"}
    assert found["answers"] == SUMMARIES["answers"].shards  # type: ignore[union-attr]


def test_every_record_of_a_finished_run_is_read(finished: "Finished") -> None:
    store = LocalStore(finished.store)
    records = [find(store, *key.split("/")[1:3]) for key in record_keys(store)]
    assert {found.stage for found in records if found is not None} == {*STAGES, "publish"} - {"vocabulary", "hidden_states"}
    for found in records:
        assert found is not None
        assert plain(parse(found)) == found.summary
        assert found.seconds > 0.0
    recipe = load_recipe(finished.recipe_file)
    trained = of(open_node(store, build_graph(recipe, store)["student.0"]), TrainSummary)
    assert (trained.arm, trained.seed, trained.training.steps) == ("student", 0, 25)


def test_no_summary_is_read_by_the_names_of_its_fields() -> None:
    """Readers ask ``of``, so that a wrong field is found by the type checker, and a wrong record where it is read."""
    files = [file for package in ("kd_core", "tasks", "flows") for file in (ROOT / package).rglob("*") if file.suffix in (".py", ".jinja")]
    assert len(files) > 200
    raw = re.compile(r"\bsummary(\([^()]*\))?(\[|\.get\()|\brecord\.summary\.")
    found = [f"{file}: {line}" for file in files for line in file.read_text(encoding="utf-8").splitlines() if raw.search(line)]
    assert found == []


def test_summaries_need_no_torch() -> None:
    code = "import kd_core.summaries, sys; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
