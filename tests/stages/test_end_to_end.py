"""A whole run of a shrunken quickstart: what it leaves, and what later runs of the same or a changed recipe compute."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from kd_core.artifacts import Record, find, read_bytes
from kd_core.ledger import history
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.rows.table import RowCache
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.summaries import shards_of

NODES = ["prompts", "teacher", "answers", "curate", "soft_labels", "student.0", "baseline.0", "ablation_hard.0"]
EVALUATIONS = ["evaluate.teacher", "evaluate.student", "evaluate.baseline", "evaluate.ablation_hard"]
VERDICT = ["gate", "report", "publish"]
METRICS = {"pass_at_1", "nll", "kl", "agreement", "truncated"}


def records(recipe: Recipe, store: LocalStore) -> dict[str, Record]:
    """Node name -> record, of the nodes that are done."""
    found = {name: find(store, node.stage, node.fingerprint) for name, node in build_graph(recipe, store).items()}
    return {name: record for name, record in found.items() if record is not None}


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """File -> (inode, time of change) of everything below a directory."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


def computed(said: dict[str, Any]) -> set[str]:
    return {node["name"] for node in said["nodes"] if node["status"] == "computed"}


def table(store: LocalStore, record: Record, name: str) -> list[dict[str, Any]]:
    return pq.read_table(f"{store.uri}/{record.prefix}/{name}").to_pylist()


# ------------------------------------------------------------------------------------------- what a run leaves


def test_every_node_is_computed_once_in_the_documented_order(finished):
    assert [node["name"] for node in finished.said["nodes"]] == [*NODES, *EVALUATIONS, *VERDICT]
    assert computed(finished.said) == {*NODES, *EVALUATIONS, *VERDICT}
    done = records(load_recipe(finished.recipe_file, [f"run.tracking={finished.tracking}"]), LocalStore(finished.store))
    assert {node["name"]: node["digest"] for node in finished.said["nodes"]} == {name: record.digest for name, record in done.items()}
    assert not [path for path in (finished.store / "checkpoints").rglob("*") if path.is_file()], "a finished run keeps no checkpoints"


def test_the_work_was_cut_into_shards_and_every_training_prompt_was_answered(finished):
    store = LocalStore(finished.store)
    done = records(load_recipe(finished.recipe_file), store)
    prompts = [row for row in table(store, done["prompts"], "prompts.parquet") if row["split"] == "train"]
    for name, rows in (("answers", len(prompts)), ("soft_labels", done["curate"].summary["rows"])):
        shards = shards_of(done[name])
        assert (shards.rows, shards.rows_computed) == (rows, rows)
        cache = RowCache(store, name, shards.namespace)
        assert [len(c.keys) for c in cache.snapshot().commits].count(64) == rows // 64 >= 3


def test_promotion_is_one_ledger_entry_with_the_students_digest(finished):
    verdict, digests = finished.said["verdict"], {node["name"]: node["digest"] for node in finished.said["nodes"]}
    assert verdict["promote"] is True
    [entry] = history(LocalStore(finished.store), "small-student")
    assert (entry.kind, entry.number, entry.artifact.digest) == ("promote", 1, digests["student.0"])


def test_the_registry_names_the_students_bytes(finished):
    from mlflow import MlflowClient

    client, published = MlflowClient(finished.tracking, finished.tracking), finished.said["published"]
    run = client.get_run(published["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.steps"] == "25"
    nested = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert {r.info.run_name for r in nested} == {*NODES, *EVALUATIONS, "gate", "report"}
    version = client.get_model_version_by_alias("small-student", "champion")
    assert int(version.version) == published["version"] == published["champion_version"] == 1
    model = Path(version.source)
    assert model.is_relative_to(finished.store)
    assert {path.name for path in model.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    [entry] = history(LocalStore(finished.store), "small-student")
    assert version.tags["kd.digest"] == entry.artifact.digest == model.parent.name


def test_the_report_as_json_has_the_documented_shape(finished, kd, monkeypatch):
    monkeypatch.chdir(finished.home)
    called = kd("report", "--json", finished.recipe_file)
    assert (called.code, called.err) == (0, "")
    report = json.loads(called.out)
    assert set(report) == {
        *("verdict", "models", "comparisons", "stages", "recipe", "suite", "confidence", "seeds", "speed_up", "memory_ratio"),
        *("counts", "curves", "samples", "versions", "suites", "published_seed"),
        *("finding", "samples_scored", "class_samples", "confusions", "certainty"),
    }
    assert report["finding"]["claim"] == "not_shown", "one seed shows nothing of a recipe"
    assert "One seed" in report["finding"]["found"]
    assert set(report["verdict"]) == {"promote", "headline", "reasons", "champion"}
    assert set(report["models"]) == {"teacher", "student", "baseline", "ablation_hard"}
    for model in report["models"].values():
        assert set(model) == {"params", "bytes", "tokens_per_second", "metrics"}
        assert set(model["metrics"]) == METRICS
        for metric in model["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]
    pairs = {(c["a"], c["b"], c["metric"]) for c in report["comparisons"]}
    assert pairs >= {("student", other, "nll") for other in ("teacher", "baseline", "ablation_hard")}
    assert [stage["name"] for stage in report["stages"]] == [
        *("prompts", "teacher", "answers", "curate", "soft_labels", "student", "baseline", "ablation_hard", "evaluate", "gate")
    ]
    assert all(set(stage) == {"name", "fingerprint", "status", "seconds"} for stage in report["stages"])
    assert report["models"]["student"]["params"] < report["models"]["teacher"]["params"]


def test_the_teachers_certainty_is_that_of_the_stored_rows(finished, kd, monkeypatch):
    monkeypatch.chdir(finished.home)
    found = json.loads(kd("report", "--json", finished.recipe_file).out)["certainty"]
    query = "SELECT sum(mean_entropy * num_supervised) / sum(num_supervised) AS mean, sum(num_supervised) AS positions FROM soft_labels"
    [row] = json.loads(kd("cache", "sql", query, "--json").out)
    assert found["mean_entropy"] == pytest.approx(row["mean"])
    assert found["positions"] == found["positions_read"] == row["positions"]
    assert 0.0 <= found["sure_share"] < 1.0


# ------------------------------------------------------------------------------------------- the second run


def test_a_second_run_finds_everything_and_never_loads_torch(finished, kd, monkeypatch):
    monkeypatch.chdir(finished.home)
    before = contents(finished.store), kd("report", "--json", finished.recipe_file).out
    code = (
        "import sys; from flows.cli import main\n"
        f"sys.argv = ['kd', 'run', '--local', '--json', {str(finished.recipe_file)!r}]\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'reasoning_gym', 'mlflow', 'prefect'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]"), "no teacher token and no training step is possible without torch"
    said = json.loads(done.stdout)
    assert [node["name"] for node in said["nodes"]] == [*NODES, *EVALUATIONS, *VERDICT]
    assert computed(said) == set()
    assert said["verdict"] == finished.said["verdict"]
    assert said["published"] == finished.said["published"]
    assert (contents(finished.store), kd("report", "--json", finished.recipe_file).out) == before


def test_a_report_made_again_for_another_registry_has_the_same_bytes_and_not_its_address(copy):
    shutil.rmtree(copy.store / "artifacts" / "report")
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"tracking": "postgresql://me:secret@host/mlflow"})})
    made = run_node(recipe, build_graph(recipe, store), "report", store=store, tick=silent, extra={})
    assert not made.hit
    assert made.digest == next(node["digest"] for node in copy.said["nodes"] if node["name"] == "report")
    record = records(recipe, store)["report"]
    assert not [file.name for file in record.files if b"secret" in read_bytes(store, record, file.name)]


# ------------------------------------------------------------------------------------------- a changed recipe


def run_until(recipe: Recipe, store: LocalStore, last: str) -> set[str]:
    """Run up to a node; the names of the nodes that were computed now."""
    done = set()
    for node in build_graph(recipe, store).values():
        if not run_node(recipe, build_graph(recipe, store), node.name, store=store, tick=silent, extra={}).hit:
            done.add(node.name)
        if node.name == last:
            break
    return done


def test_another_objective_reuses_everything_above_it(copy):
    recipe = load_recipe(copy.recipe_file, ["objective.soft_weight=0.5", "objective.hard_weight=0.5"])
    assert run_until(recipe, LocalStore(copy.store), "gate") == {"student.0", "evaluate.student", "evaluate.champion", "gate"}


def test_more_prompts_cost_only_themselves(copy):
    store, recipe = LocalStore(copy.store), load_recipe(copy.recipe_file, ["prompts.sources.0.num=330"])
    old = records(load_recipe(copy.recipe_file), store)
    assert run_until(recipe, store, "soft_labels") == {"prompts", "answers", "curate", "soft_labels"}
    new = records(recipe, store)

    def asked(done: dict[str, Record]) -> set[str]:
        return {row["prompt"] for row in table(store, done["prompts"], "prompts.parquet") if row["split"] == "train"}

    def learnt(done: dict[str, Record]) -> set[tuple[tuple[int, ...], int]]:
        return {(tuple(row["ids"]), row["first_supervised"]) for row in table(store, done["curate"], "rows.parquet")}

    assert asked(old) < asked(new)
    assert new["answers"].summary["shards"]["rows_computed"] == len(asked(new) - asked(old)) > 10
    assert new["soft_labels"].summary["shards"]["rows_computed"] == len(learnt(new) - learnt(old)) > 10
    assert new["soft_labels"].summary["shards"]["rows"] > len(learnt(new) - learnt(old)) * 5


def test_a_student_that_fails_the_gate_is_registered_and_nothing_else_moves(copy, kd):
    from mlflow import MlflowClient

    floor = "gate.rules=[{kind: floor, metric: pass_at_1, minimum: 0.999}]"
    called = kd("run", "--local", "--json", copy.recipe_file, "--set", floor, "--set", "training.learning_rate=0.002")
    assert (called.code, called.err) == (0, "")
    said = json.loads(called.out)
    assert said["verdict"]["promote"] is False
    [entry] = history(LocalStore(copy.store), "small-student")
    kept = next(node["digest"] for node in copy.said["nodes"] if node["name"] == "student.0")
    mine = next(node["digest"] for node in said["nodes"] if node["name"] == "student.0")
    assert entry.artifact.digest == kept != mine
    assert "evaluate.champion" in computed(said), "the gate met the champion"
    client = MlflowClient(copy.tracking, copy.tracking)
    aliases = {alias: client.get_model_version_by_alias("small-student", alias) for alias in ("champion", "challenger")}
    assert {alias: version.tags["kd.digest"] for alias, version in aliases.items()} == {"champion": kept, "challenger": mine}


def test_a_report_without_scored_answers_shows_some_of_the_published_student_and_the_teacher(copy):
    overrides = ["evaluation.generate=null", "evaluation.compare=[teacher, ablation_hard]", "seeds=[0, 1]"]
    store, recipe = LocalStore(copy.store), load_recipe(copy.recipe_file, overrides)
    run_until(recipe, store, "report")
    done = records(recipe, store)
    report = json.loads(read_bytes(store, done["report"], "report.json"))
    assert report["samples_scored"] is False
    assert len(report["samples"]) == 5
    assert {(a["model"], a["right"]) for sample in report["samples"] for a in sample["answers"]} == {("teacher", None), ("student", None)}
    assert all("pass_at_1" not in model["metrics"] for model in report["models"].values())
    answered = [row for row in table(store, done["evaluate.student"], "scores.parquet") if row["text"] is not None]
    assert {row["seed"] for row in answered} == {report["published_seed"]}
    shown = [next(a["text"] for a in sample["answers"] if a["model"] == "student") for sample in report["samples"]]
    assert shown == [row["text"] for row in answered]


def test_the_resolved_recipe_lies_beside_the_report(finished):
    store = LocalStore(finished.store)
    recipe = load_recipe(finished.recipe_file)
    written = yaml.safe_load(read_bytes(store, records(recipe, store)["report"], "recipe.yaml"))
    assert written == recipe.model_dump(mode="json")
