"""Damage in a finished run's store is named before a training step, put aside, and computed again to the same bytes."""

from pathlib import Path

import pytest
import torch

from kd_core.artifacts import find
from kd_core.errors import SoftLabelError, StoreError
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.rows.table import RowCache
from kd_core.softlabels.hidden import decode_states
from kd_core.stages import soft_labels
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.task_kinds import generation
from kd_core.train.checkpoints import Checkpoints


def digest(recipe: Recipe, store: LocalStore, name: str) -> str:
    record = find(store, (node := build_graph(recipe, store)[name]).stage, node.fingerprint)
    assert record is not None
    return record.digest


def shards(store: Path, table: str) -> list[Path]:
    return sorted((store / "rows" / table).rglob("*.parquet"))


def damage(path: Path, *, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 8
    path.write_bytes(data)


def forget_node(recipe: Recipe, store: LocalStore, name: str) -> None:
    node = build_graph(recipe, store)[name]
    store.delete(f"artifacts/{node.stage}/{node.fingerprint}/record.json")


@pytest.mark.parametrize("table", ["soft_labels", "answers"])
def test_a_damaged_shard_is_computed_again_in_the_same_run(copy, table: str, caplog: pytest.LogCaptureFixture) -> None:
    """Fault 10 of the promise: named, moved aside, made again; whoever needed it ends with the same bytes."""
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    needs = {"soft_labels": "student.0", "answers": "curate"}[table]
    before, files = digest(recipe, store, needs), shards(copy.store, table)
    wanted = {path: path.read_bytes() for path in files}
    damage(files[1])
    forget_node(recipe, store, needs)
    made = run_node(recipe, build_graph(recipe, store), needs, store=store, tick=silent, extra={})
    assert (made.hit, made.digest) == (False, before)
    assert {path: path.read_bytes() for path in shards(copy.store, table)} == wanted
    assert (copy.store / "quarantine" / files[1].relative_to(copy.store)).is_file()
    assert files[1].stem in caplog.text
    assert "computed again" in caplog.text


def test_damage_is_met_before_a_training_step(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    forget_node(recipe, store, "student.0")
    steps: list[int] = []
    real = torch.optim.AdamW.step

    def counted(self, *given, **named):
        steps.append(1)
        return real(self, *given, **named)

    for path in shards(copy.store, "soft_labels"):
        damage(path, at=0.999)  # its footer: nothing of the shard can be trusted
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    monkeypatch.setattr(generation, "load_text_teacher", lambda work: pytest.fail("the teacher is gone too"))
    with pytest.raises(BaseException, match="the teacher is gone too"):
        run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={})
    assert steps == []


def test_a_shard_that_is_gone_fails_fast_with_its_name(copy) -> None:
    """Fault 11: a shard that a commit names and nobody holds may be a wrong address or missing rights: nothing is deleted for it."""
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    forget_node(recipe, store, "student.0")
    gone = shards(copy.store, "soft_labels")[0]
    gone.unlink()
    commits = sorted((copy.store / "rows/soft_labels").rglob("commits/*.json"))
    with pytest.raises(StoreError, match=gone.name):
        run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={})
    assert sorted((copy.store / "rows/soft_labels").rglob("commits/*.json")) == commits


def test_rows_put_aside_by_another_run_are_computed_again(copy) -> None:
    """The record is there and one of its shards is not committed any more: the record goes, its rows come back."""
    recipe, store = load_recipe(copy.recipe_file), LocalStore(copy.store)
    before = digest(recipe, store, "student.0")
    forget_node(recipe, store, "student.0")
    node = build_graph(recipe, store)["soft_labels"]
    record = find(store, "soft_labels", node.fingerprint)
    assert record is not None
    cache = RowCache(store, "soft_labels", record.summary["shards"]["namespace"])
    commit = cache.snapshot().commits[0]
    damage(copy.store / cache.shard_key(commit))
    cache.quarantine(commit, "found by another run")
    assert run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={}).digest == before
    again = find(store, "soft_labels", node.fingerprint)
    assert again is not None
    assert again.summary["shards"]["rows_computed"] == len(commit.keys)


def test_a_shard_that_is_made_again_has_the_model_it_had(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards go on with the codec's model of the shard before: also where a run was killed there, and models had changed on the way."""
    options = ["soft_labels={kind: topk, k: 3, temperatures: [1.0]}", "objective.temperature=1.0", "run.shard_rows=24"]
    recipe, store = load_recipe(copy.recipe_file, options), LocalStore(copy.store)
    real, used = soft_labels.encode_rows, set[bytes]()

    def changing(rows, labels, known):
        model, blobs = real(rows, labels, b"" if len(labels[0]) % 2 else known)
        used.add(model)
        return model, blobs

    monkeypatch.setattr(soft_labels, "encode_rows", changing)
    run_node(recipe, build_graph(recipe, store), "soft_labels", store=store, tick=silent, extra={})
    record = find(store, "soft_labels", build_graph(recipe, store)["soft_labels"].fingerprint)
    assert record is not None
    cache = RowCache(store, "soft_labels", record.summary["shards"]["namespace"])
    commits = cache.snapshot().commits
    assert 1 < len(used) < len(commits)
    for commit in commits:
        store.delete(cache.commit_key(commit))
        forget_node(recipe, store, "soft_labels")
        run_node(recipe, build_graph(recipe, store), "soft_labels", store=store, tick=silent, extra={})
        assert cache.snapshot().commits == commits


def test_a_row_the_teacher_fails_on_is_refused_counted_and_bounded(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN rows: an error by default; within a budget they are left out of both the student's and the ablation's rows."""
    store = LocalStore(copy.store)
    real = generation.score_rows

    def failing(teacher, rows, **named):
        found = real(teacher, rows, **named)
        bad = {scored.key for scored in found.scored if int(scored.key[:2], 16) < 8}
        kept = tuple(scored for scored in found.scored if scored.key not in bad)
        return type(found)(kept, {**found.refused, **dict.fromkeys(bad, "the teacher gave NaN")})

    monkeypatch.setattr(generation, "score_rows", failing)
    strict = load_recipe(copy.recipe_file, ["soft_labels={kind: sampled, num_draws: 7, temperature: 2.0}", "objective.temperature=2.0"])
    with pytest.raises(
        SoftLabelError, match=r"(\d+) of \d+ rows have no usable teacher output, and max_refused_rows allows 0; first row"
    ) as error:
        run_node(strict, build_graph(strict, store), "soft_labels", store=store, tick=silent, extra={})
    assert "the teacher gave NaN" in str(error.value)
    allowed = ["soft_labels={kind: sampled, num_draws: 7, temperature: 2.0, max_refused_rows: 60}", "objective.temperature=2.0"]
    recipe = load_recipe(copy.recipe_file, allowed)
    nodes = build_graph(recipe, store)
    for name in ("soft_labels", "student.0", "ablation_hard.0"):
        run_node(recipe, build_graph(recipe, store), name, store=store, tick=silent, extra={})
    record, student, ablation = (find(store, nodes[n].stage, nodes[n].fingerprint) for n in ("soft_labels", "student.0", "ablation_hard.0"))
    assert record is not None
    assert student is not None
    assert ablation is not None
    curated = find(store, "curate", nodes["curate"].fingerprint)
    assert curated is not None
    assert 0 < record.summary["rows_refused"] <= 60
    assert (
        student.summary["training"]["rows"]
        == ablation.summary["training"]["rows"]
        == curated.summary["rows"] - record.summary["rows_refused"]
    )
    assert record.summary["shards"]["rows_computed"] == record.summary["rows_refused"], "the others were kept by the run that failed"


def test_hidden_states_are_kept_in_shards_of_their_own(copy) -> None:
    store = LocalStore(copy.store)
    recipe = load_recipe(copy.recipe_file, ["hidden_states={blocks: [0, 1], width: 8, reduce: project}"])
    run_node(recipe, build_graph(recipe, store), "hidden_states", store=store, tick=silent, extra={})
    node = build_graph(recipe, store)["hidden_states"]
    record = find(store, "hidden_states", node.fingerprint)
    assert record is not None
    cache = RowCache(store, "hidden_states", record.summary["shards"]["namespace"])
    snapshot = cache.snapshot()
    rows = cache.read(snapshot, sorted(snapshot.keys())).to_pylist()
    assert len(rows) == record.summary["shards"]["rows_computed"] > 100
    for row in rows[:5]:
        assert decode_states(row["states"]).states().shape == (row["num_supervised"], 2, 8)
    assert Checkpoints(store, node.fingerprint).steps() == []
