"""Feature distillation through the training loop: exact under any split, from cached or live states, and no trace of it in the student."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kd_core.errors import SoftLabelError, TeacherError, TrainingError
from kd_core.losses.features import hidden_state_loss, relation_loss
from kd_core.progress import silent
from kd_core.recipe import (
    Adapter,
    BlockPair,
    Constant,
    Features,
    HiddenStateFeatures,
    HiddenStates,
    Objective,
    Piecewise,
    RelationFeatures,
    Run,
    Sampled,
    Training,
)
from kd_core.rows.range_cache import RangeCache
from kd_core.rows.schemas import HIDDEN_STATE_SCHEMA
from kd_core.rows.table import RowCache
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.softlabels.hidden import capture_hidden, encode_states
from kd_core.store import LocalStore
from kd_core.student.adapters import add_adapters
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.train import batches as feed
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.features import CachedStates, FeatureTask, LiveTeacher
from kd_core.train.loop import TrainingResult, train
from kd_core.train.row_order import MemoryRows, TrainingData
from kd_core.train.stored_rows import ShardGroups, StoredRows

EOS = 1
ROWS = [
    TokenRow((9, 12, 7, 14, 9, 12, 7, 14, 3, 4, EOS), 4),
    TokenRow((3, 14, EOS), 2),
    TokenRow((5, 6, 7, 8, 9, 10, 11, EOS), 1),
    TokenRow((4, 4, 14, 3, EOS), 3),
    TokenRow((16, 2, 13, 14, 2, 2, 2, 2, 2, 2, 2, 2, 2, EOS), 4),
]
PAIRS = (BlockPair(student=0, teacher=1), BlockPair(student=1, teacher=2))
RELATIONS = RelationFeatures(kind="relations", num_heads=4, weight=Constant(kind="constant", value=0.5))
TRAINING = Training(steps=6, batch_rows=3, learning_rate=0.01, warmup_steps=2)
ONE_STEP = Training(steps=1, batch_rows=len(ROWS), learning_rate=0.01, clip_norm=None)


def states(**changes: Any) -> HiddenStateFeatures:
    return HiddenStateFeatures(**{"kind": "hidden_states", "source": "live", "weight": 0.5} | changes)


def live(teacher: LoadedModel, features: Features, pairs: tuple[BlockPair, ...] = PAIRS) -> FeatureTask:
    return FeatureTask(features, pairs, LiveTeacher(teacher, features, pairs))


@pytest.fixture
def teacher(tiny_model) -> LoadedModel:
    return tiny_model(num_layers=3)


@pytest.fixture
def student(tiny_model) -> torch.nn.Module:
    return tiny_model(seed=7, vocab_size=20).model.requires_grad_(True)


@pytest.fixture
def data(teacher) -> TrainingData:
    policy = Sampled(kind="sampled", num_draws=9, temperature=2.0)
    scored = score_rows(teacher, [(row_key("n", row), row) for row in ROWS], policy=policy, micro_batch_tokens=64).scored
    return TrainingData(MemoryRows(ROWS, lambda i: scored[i].targets), ROWS[:2])


@pytest.fixture
def cached(teacher, tmp_path, tmp_path_factory) -> Callable[..., FeatureTask]:
    """Features from real shards of captured states; ``rows`` are those whose states are kept."""

    def make(features: Features, rows: list[TokenRow] = ROWS, pairs: tuple[BlockPair, ...] = PAIRS, **wanted: Any) -> FeatureTask:
        store = LocalStore(tmp_path_factory.mktemp("states"))
        keyed = [(row_key("n", row), row) for row in rows]
        captured = capture_hidden(teacher, keyed, wanted=HiddenStates(**{"blocks": (0, 1, 2)} | wanted), micro_batch_tokens=64).captured
        shared = {"prompt_id": "p", "sample_index": 0, "source": "gold", "finish_reason": "stop"}
        table = pa.Table.from_pylist(
            [
                {
                    **shared,
                    "key": key,
                    "ids": row.ids,
                    "first_supervised": row.first_supervised,
                    "num_supervised": row.num_supervised,
                    "states": encode_states(found.states),
                }
                for (key, row), found in zip(keyed, captured, strict=True)
            ],
            schema=HIDDEN_STATE_SCHEMA,
        )
        cache = RowCache(store, "hidden_states", "n")
        cache.commit(table.take([3, 0, 1]), num_tokens=1)  # in two shards, in another order
        cache.commit(table.take([4, 2]), num_tokens=1)
        groups = ShardGroups(cache, cache.snapshot(), RangeCache(store, tmp_path / "copies", 1 << 20), [key for key, _ in keyed])
        sizes = {"num_tokens": [len(row.ids) for row in rows], "first_supervised": [row.first_supervised for row in rows]}
        stored = StoredRows(groups, groups.group, groups.row, **{name: np.array(value, np.int32) for name, value in sizes.items()})
        return FeatureTask(features, pairs, CachedStates(stored, pairs))

    return make


def objective(features: Features | None, **changes: Any) -> Objective:
    given: dict[str, Any] = {"supervision": "soft", "hard_weight": 0.3, "soft_weight": 0.7, "temperature": 2.0}
    return Objective(**given | changes, features=features)


def fit(model: Any, directory: Path, task: FeatureTask | None, **changes: Any) -> TrainingResult:
    given: dict[str, Any] = {"training": TRAINING, "seed": 0, "run": Run(device="cpu"), "num_columns": 17, "tick": silent}
    given |= {"objective": objective(None if task is None else task.features), "features": task}
    return train(model, checkpoints=Checkpoints(LocalStore(directory), "f" * 32), **given | changes)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


# ------------------------------------------------------------------------------------------- against a reference


def step_gradient(student, data, task: FeatureTask, directory: Path, monkeypatch, **run: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Gradient of one whole-batch step as the optimiser sees it, projections included, and the logged numbers."""
    model, seen = copy.deepcopy(student), dict[str, Any]()

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
            seen.update({f"projection.{i}": p.grad.clone() for i, p in enumerate(self.param_groups[-1]["params"])})
            return super().step(closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        result = fit(model, directory, task, data=data, training=ONE_STEP, run=Run(device="cpu", **run))
    return seen, result.metrics[-1]


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any], *, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm().double() for gradient in expected.values()]).norm()
    off = {name: float((found[name].double() - gradient.double()).norm() / norm) for name, gradient in expected.items()}
    assert max(off.values()) < tolerance, off


def outputs_of(model: Any, row: TokenRow, modules: list[Any]) -> list[torch.Tensor]:
    """What modules give where supervised tokens are predicted; one row, with the model's own attention."""
    seen: dict[Any, torch.Tensor] = {}
    handles = [m.register_forward_hook(lambda m, _, out: seen.__setitem__(m, out[0] if isinstance(out, tuple) else out)) for m in modules]
    model(input_ids=torch.tensor([row.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[m][0, row.first_supervised - 1 : len(row.ids) - 1] for m in modules]


@pytest.mark.parametrize(
    "features", [states(loss="mse"), states(loss="cosine"), states(), RELATIONS], ids=lambda f: getattr(f, "loss", f.kind)
)
def test_the_gradient_is_the_mean_over_supervised_tokens(student, teacher, data, monkeypatch, tmp_path, features: Features) -> None:
    """Against plain autograd in float64, a row at a time: what features add to the gradient without them."""
    only = {"hard_weight": 0.0, "soft_weight": Constant(kind="constant", value=1e-30)}
    monkeypatch.setattr(f"{__name__}.objective", lambda f, real=objective: real(f, **only))
    found, logged = step_gradient(student, data, live(teacher, features), tmp_path, monkeypatch)
    exact, theirs = copy.deepcopy(student).double(), copy.deepcopy(teacher.model).double()
    total, names, count = torch.zeros((), dtype=torch.float64), ("q_proj", "k_proj", "v_proj"), sum(row.num_supervised for row in ROWS)
    projections = [torch.eye(16, dtype=torch.float64, requires_grad=True) for _ in PAIRS]
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # the losses themselves are held to float64 in tests/losses
    for row in ROWS:
        for pair, projection in zip(PAIRS, projections, strict=True):
            ours, other = exact.model.layers[pair.student], theirs.model.layers[pair.teacher]
            if isinstance(features, RelationFeatures):
                s, t = (outputs_of(m, row, [getattr(b.self_attn, n) for n in names]) for m, b in ((exact, ours), (theirs, other)))
                for s_NA, t_NA in zip(s, t, strict=True):
                    total = total + relation_loss(s_NA, t_NA, lengths=(len(s_NA),), num_heads=4) / 3 / len(PAIRS)
            else:
                (s_NH,), (t_NH,) = outputs_of(exact, row, [ours]), outputs_of(theirs, row, [other])
                total = total + hidden_state_loss(s_NH @ projection.T, t_NH, features.loss) / len(PAIRS)
    monkeypatch.undo()
    (0.5 * total / count).backward()
    assert logged["feature"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert logged["loss"] == pytest.approx(0.5 * logged["feature"], rel=1e-6)
    expected = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in exact.named_parameters()}
    if features is not RELATIONS:
        expected |= {f"projection.{i}": p.grad for i, p in enumerate(projections)}
    else:
        found = {name: gradient for name, gradient in found.items() if "projection" not in name}
    assert_same_gradients(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("features", [states(), RELATIONS], ids=lambda f: f.kind)
def test_splits_padding_and_packing_change_neither_loss_nor_gradient(student, teacher, data, monkeypatch, tmp_path, features) -> None:
    """Traps 3, 12 and 15."""
    task, real, collate = live(teacher, features), feed.pack_batches, feed.collate
    whole, logged = step_gradient(student, data, task, tmp_path / "whole", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(feed, "pack_batches", lambda lengths, budget: real(lengths, 1))
        single = step_gradient(student, data, task, tmp_path / "single", monkeypatch)

    def wide(rows):
        batch = collate(rows)
        filled = {"ids_BT": 0, "attention_BT": 0, "predict_BT": False}
        more = {name: torch.nn.functional.pad(getattr(batch, name), (0, 9), value=value) for name, value in filled.items()}
        return type(batch)(**more, labels_N=batch.labels_N)

    with monkeypatch.context() as patch:
        patch.setattr("kd_core.train.reading.unpackable", lambda model: "padding is what is looked at")
        padded = step_gradient(student, data, task, tmp_path / "padded", monkeypatch, micro_batch_tokens=64)
        patch.setattr(feed, "collate", wide)
        wider = step_gradient(student, data, task, tmp_path / "wider", monkeypatch)
    recomputed = step_gradient(student, data, task, tmp_path / "recomputed", monkeypatch, activation_checkpointing=True)
    for other, logged_other in (single, padded, wider, recomputed):
        assert_same_gradients(other, whole, tolerance=1e-6)
        for name in ("loss", "feature", "gradient_norm"):
            assert logged_other[name] == pytest.approx(logged[name], rel=1e-5)


# ------------------------------------------------------------------------------------------- cached and live


def test_cached_states_are_the_live_ones_within_half_a_step(student, teacher, data, cached, tmp_path) -> None:
    """Half a step is absmax / 254 a column; shards hold the rows in another order, and each row gets its own states."""
    features, layout = states(source="cached"), feed.TokenLayout(True, 1000, torch.device("cpu"))
    batch = layout.batch([ROWS[i] for i in (2, 0, 4)])
    kept = cached(features).source.read([2, 0, 4], [ROWS[i] for i in (2, 0, 4)], batch)
    own = live(teacher, features).source.read([2, 0, 4], [ROWS[i] for i in (2, 0, 4)], batch)
    assert kept.lengths == own.lengths == (7, 7, 10)
    for kept_NW, own_NW in zip(kept.vectors, own.vectors, strict=True):
        half_step_N1 = own_NW.abs().amax(-1, keepdim=True) / 254
        assert bool(((kept_NW - own_NW).abs() <= half_step_N1 * 1.001 + 1e-6).all())
    twins = [copy.deepcopy(student) for _ in range(2)]
    runs = [
        fit(twins[0], tmp_path / "cached", cached(features), data=data),
        fit(twins[1], tmp_path / "live", live(teacher, features), data=data),
    ]
    for mine, theirs in zip(runs[0].metrics, runs[1].metrics, strict=True):
        assert mine["feature"] == pytest.approx(theirs["feature"], rel=0.02)
    assert runs[0].metrics != runs[1].metrics


def test_states_of_another_block_are_not_near(teacher, data, cached) -> None:
    """Trap 23: block i is block i's output."""
    features, layout = states(source="cached"), feed.TokenLayout(True, 1000, torch.device("cpu"))
    batch = layout.batch(ROWS)
    kept, own = (task.source.read(range(5), ROWS, batch).vectors for task in (cached(features), live(teacher, features)))
    assert float((kept[0] - own[0]).norm() / own[0].norm()) < 0.01
    assert float((kept[0] - own[1]).norm() / own[0].norm()) > 0.1


def test_states_of_a_narrower_slice_teach_through_a_projection(student, data, cached, tmp_path) -> None:
    task = cached(states(source="cached"), width=5)
    assert task.source.widths == (5, 5)
    metrics = fit(student, tmp_path / "run", task, data=data, training=Training(steps=60, batch_rows=5, learning_rate=0.01)).metrics
    assert metrics[-1]["feature"] < 0.7 * metrics[0]["feature"]


def test_states_of_other_tokens_are_refused(student, data, cached, tmp_path) -> None:
    """Traps 13 and 16: rows are compared by content, and nothing is trained without its states."""
    shuffled = cached(states(source="cached"), rows=[ROWS[i] for i in (1, 0, 2, 3, 4)])
    with pytest.raises(SoftLabelError, match="are of other tokens than the rows"):
        fit(student, tmp_path / "a", shuffled, data=data)
    with pytest.raises(SoftLabelError, match="features and there is no teacher to take them from"):
        fit(student, tmp_path / "b", None, data=data, objective=objective(states()))
    with pytest.raises(SoftLabelError, match=r"states of the teacher's blocks \[2\] were not captured, only of \[0, 1\]"):
        cached(states(source="cached"), blocks=(0, 1))


# ------------------------------------------------------------------------------------------- the run


def test_without_features_nothing_changes(student, data, tmp_path) -> None:
    result = fit(student, tmp_path, None, data=data)
    assert not any("feature" in name for name in result.metrics[0])


def test_the_teacher_is_a_fixed_point(teacher, data, tmp_path) -> None:
    """Trap 1: the teacher as its own student has no feature loss through identity projections; a block off, it has."""
    pairs, features = (BlockPair(student=1, teacher=1),), states()
    model = copy.deepcopy(teacher.model).requires_grad_(True)
    only = objective(features, hard_weight=0.0, soft_weight=Constant(kind="constant", value=1e-30))
    last = fit(model, tmp_path / "same", live(teacher, features, pairs), data=data, training=ONE_STEP, objective=only).metrics[-1]
    assert last["feature"] < 1e-10
    assert last["gradient_norm"] < 1e-5
    model = copy.deepcopy(teacher.model).requires_grad_(True)
    off = (BlockPair(student=0, teacher=1),)
    last = fit(model, tmp_path / "off", live(teacher, features, off), data=data, training=ONE_STEP, objective=only).metrics[-1]
    assert last["feature"] > 0.01
    assert last["gradient_norm"] > 0.01


def test_the_log_names_the_feature_part_its_weight_and_its_gradient(student, teacher, data, tmp_path) -> None:
    """Trap 24; the norm is the student's own, without the projections'."""
    features = states()
    first, last = (fit(copy.deepcopy(student), tmp_path / "both", live(teacher, features), data=data).metrics[i] for i in (0, -1))
    assert last["loss"] == pytest.approx(0.3 * last["hard"] + 0.7 * 4.0 * last["soft"] + 0.5 * last["feature"], rel=1e-5)
    assert last["feature_weight"] == 0.5
    assert {name for name in first if name.startswith("gradient_norm_")} == {
        f"gradient_norm_{part}" for part in ("hard", "soft", "feature")
    }


def test_the_student_has_no_trace_of_the_projections_and_the_teacher_stands_still(student, teacher, data, tmp_path) -> None:
    names, before = list(student.state_dict()), weights(teacher.model)
    fit(student, tmp_path, live(teacher, states()), data=data)
    assert list(student.state_dict()) == names
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.model.modules()))
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher.model).items())
    assert not teacher.model.training
    assert teacher.model.config._attn_implementation == "sdpa"


def test_a_weight_that_is_zero_for_a_while_runs_no_teacher(student, teacher, data, monkeypatch, tmp_path) -> None:
    features = states(weight=Piecewise(kind="piecewise", values=(0.0, 1.0), at=(0.5,)))
    task, calls = live(teacher, features), []
    monkeypatch.setattr(teacher.model.model, "forward", lambda *a, real=teacher.model.model.forward, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr("kd_core.train.loop._LOG_EVERY", 1)
    metrics = fit(student, tmp_path, task, data=data).metrics
    assert [row["feature_weight"] for row in metrics] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert ["feature" in row for row in metrics] == [False, False, False, True, True, True]
    assert len(calls) == 3


@pytest.mark.parametrize("source", ["cached", "live"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(student, teacher, data, cached, monkeypatch, tmp_path, source) -> None:
    features = states(source=source)
    task = cached(features, width=5) if source == "cached" else live(teacher, features)
    run = Run(device="cpu", checkpoint_every_steps=2)
    unbroken, resumed = copy.deepcopy(student), copy.deepcopy(student)
    expected = fit(unbroken, tmp_path / "unbroken", task, data=data, run=run)
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", {"train.step": 0})
        patch.setenv("KD_FAILPOINT", "train.step:5:error")
        with pytest.raises(OSError, match="fail point"):
            fit(copy.deepcopy(student), tmp_path / "broken", task, data=data, run=run)
    found = fit(resumed, tmp_path / "broken", task, data=data, run=run)
    assert (found.resumed_from, found.metrics) == (4, expected.metrics)
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(unbroken).items())


def test_adapters_learn_features_too(student, teacher, data, tmp_path) -> None:
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    adapted = add_adapters(student, Adapter(kind="lora", rank=2, alpha=4.0), seed=0)
    metrics = fit(adapted, tmp_path, live(teacher, RELATIONS), data=data).metrics
    assert metrics[0]["gradient_norm_feature"] > 0.0


def test_bfloat16_training_gives_nearly_the_same_feature_loss(student, teacher, data, tmp_path) -> None:
    training = TRAINING.model_copy(update={"dtype": "bfloat16"})
    for features in (states(), RELATIONS):
        exact = fit(copy.deepcopy(student), tmp_path / f"exact {features.kind}", live(teacher, features), data=data).metrics[0]
        rounded = fit(copy.deepcopy(student), tmp_path / f"rounded {features.kind}", live(teacher, features), data=data, training=training)
        assert rounded.metrics[0]["feature"] == pytest.approx(exact["feature"], rel=0.05)


# ------------------------------------------------------------------------------------------- what is refused


def test_a_teacher_that_is_not_itself_is_refused(teacher) -> None:
    """Trap 20."""
    teacher.model.train()
    with pytest.raises(TeacherError, match="not in eval mode"):
        live(teacher, states())


def test_a_model_with_one_projection_for_all_three_has_no_relations_here(teacher) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1)).eval()
    other = LoadedModel(model.requires_grad_(False), teacher.tokenizer, 17)
    with pytest.raises(
        TrainingError, match=r"GPT2LMHeadModel have no projection for queries, keys, values alone .*; use kind: hidden_states"
    ):
        live(other, RELATIONS, (BlockPair(student=0, teacher=0),))
    assert live(other, states(), (BlockPair(student=0, teacher=1),)).source.widths == (16,)
