"""The training loop: exact under any split of the batch, any padding, any interruption; and it does what the objective says."""

import copy
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.errors import SoftLabelError, TrainingError
from kd_core.losses.divergences import FORWARD_KL
from kd_core.progress import Tick, silent
from kd_core.recipe import Constant, Decay, Dense, Objective, ReduceOnPlateau, Run, Sampled, SoftLabels, Training
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.store import LocalStore
from kd_core.tokens.batches import TokenRow, collate
from kd_core.train import batches as feed
from kd_core.train import state
from kd_core.train.batches import Layout, dealt_batches
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.loop import TrainingResult, train
from kd_core.train.objective_model import ObjectiveModel, validation_sums
from kd_core.train.row_order import MemoryRows, TrainingData

EOS = 1
ROWS = [
    TokenRow((9, 12, 7, 14, 9, 12, 7, 14, 3, 4, EOS), 4),
    TokenRow((3, 14, EOS), 2),
    TokenRow((5, 6, 7, 8, 9, 10, 11, EOS), 1),
    TokenRow((4, 4, 14, 3, EOS), 3),
    TokenRow((16, 2, 13, 14, 2, 2, 2, 2, 2, 2, 2, 2, 2, EOS), 4),
]
SOFT = Objective(supervision="soft", hard_weight=0.3, soft_weight=0.7, temperature=2.0)
HARD = Objective(supervision="hard")
COMPILED = (
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"),
)
NONE, ONE = (Constant(kind="constant", value=value) for value in (0.0, 1.0))
TRAINING = Training(steps=6, batch_rows=3, learning_rate=0.01, warmup_steps=2)
LAYOUT = Layout(packed=False, budget_tokens=16, device=torch.device("cpu"))
SAMPLED = Sampled(kind="sampled", num_draws=9, temperature=2.0)


def targets_of(teacher: Any, rows: list[TokenRow], policy: SoftLabels) -> Any:
    keyed = [(row_key("n", row), row) for row in rows]
    scored = score_rows(teacher, keyed, policy=policy, micro_batch_tokens=64).scored
    return lambda i: scored[i].targets


def fit(model: torch.nn.Module, directory: Path, **changes: Any) -> TrainingResult:
    given: dict[str, Any] = {"training": TRAINING, "objective": SOFT, "seed": 0, "run": Run(device="cpu"), "num_columns": 17}
    given |= {"checkpoints": Checkpoints(LocalStore(directory), "f" * 32), "tick": silent} | changes
    return train(model, **given)


@pytest.fixture
def student(tiny_model) -> torch.nn.Module:
    return tiny_model(seed=7, vocab_size=20).model.requires_grad_(True)


@pytest.fixture
def data(tiny_model) -> TrainingData:
    return TrainingData(MemoryRows(ROWS, targets_of(tiny_model(), ROWS, SAMPLED)), ROWS[:2])


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


# ------------------------------------------------------------------------------------------- exact under any split


def step_gradient(student, data, monkeypatch, tmp_path, *, micro_batch_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient of one whole-batch step as the optimiser sees it, and the logged numbers."""
    model, seen = copy.deepcopy(student), {}

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
            return super().step(closure)

    training = Training(steps=1, batch_rows=len(ROWS), learning_rate=0.01, clip_norm=None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        run = Run(device="cpu", micro_batch_tokens=micro_batch_tokens)
        result = fit(model, tmp_path / str(micro_batch_tokens), data=data, training=training, run=run)
    return seen, result.metrics[-1]


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float) -> None:
    """Every parameter's difference is below ``tolerance`` of the whole gradient's norm, as float32 sums differ in order only."""
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    differences = {name: float((found[name].double() - gradient.double()).norm() / norm) for name, gradient in expected.items()}
    assert max(differences.values()) < tolerance, differences


def test_micro_batches_change_neither_loss_nor_gradient(student, data, monkeypatch, tmp_path) -> None:
    """Trap 12: the mean is over the step's tokens, not over its micro-batches."""
    real = feed.pack_batches
    monkeypatch.setattr(feed, "pack_batches", lambda lengths, budget: real(lengths, budget if budget > 64 else 1))
    whole, logged = step_gradient(student, data, monkeypatch, tmp_path, micro_batch_tokens=16_384)
    single, logged_single = step_gradient(student, data, monkeypatch, tmp_path, micro_batch_tokens=64)  # one row a pass
    assert len(whole) == len(list(student.parameters()))
    assert_same_gradients(single, whole, tolerance=1e-6)
    for name in ("loss", "hard", "soft", "gradient_norm"):
        assert logged_single[name] == pytest.approx(logged[name], rel=1e-5)


def test_the_gradient_is_the_mean_over_supervised_tokens(student, data, monkeypatch, tmp_path) -> None:
    """Against plain autograd, one row at a time, in float64 and without collate: no prompt or padding position counts."""
    found, logged = step_gradient(student, data, monkeypatch, tmp_path, micro_batch_tokens=16_384)
    exact = copy.deepcopy(student).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, row in enumerate(ROWS):
        logits_NV = exact(input_ids=torch.tensor([row.ids])).logits[0, row.first_supervised - 1 : -1, :17]
        labels_N = torch.tensor(row.ids[row.first_supervised :])
        total = total + 0.3 * torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
        log_q_NV, targets = torch.log_softmax(logits_NV / 2.0, -1), data.rows.targets([i])
        at = torch.repeat_interleave(torch.arange(row.num_supervised), targets.offsets_N1.diff())
        cross = -(targets.counts_E * log_q_NV[at, targets.ids_E]).sum() / 9
        total = total + 0.7 * 4.0 * (cross - targets.cross_entropy_offset_N.double().sum())
        count += row.num_supervised
    (total / count).backward()
    assert logged["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert_same_gradients(found, {name: parameter.grad for name, parameter in exact.named_parameters()}, tolerance=1e-5)


def test_extra_padding_changes_neither_loss_nor_gradient(student, data, monkeypatch, tmp_path) -> None:
    """Trap 3: the same step with nine more padded positions in every batch."""

    def padded(rows):
        batch = collate(rows)
        wide = {
            name: torch.nn.functional.pad(getattr(batch, name), (0, 9), value=value)
            for name, value in (("ids_BT", 0), ("attention_BT", 0), ("predict_BT", False))
        }
        return type(batch)(**wide, labels_N=batch.labels_N)

    monkeypatch.setattr("kd_core.train.loop.unpackable", lambda model: "padding is what is looked at")
    plain, logged = step_gradient(student, data, monkeypatch, tmp_path / "plain", micro_batch_tokens=16_384)
    monkeypatch.setattr(feed, "collate", padded)
    wide, logged_wide = step_gradient(student, data, monkeypatch, tmp_path / "wide", micro_batch_tokens=16_384)
    assert logged_wide["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert_same_gradients(wide, plain, tolerance=1e-6)


def test_packed_documents_and_padded_rows_give_the_same_loss_and_gradient(student, data, monkeypatch, tmp_path) -> None:
    """Traps 12 and 15, within 1e-6 of the gradient's norm."""
    packed, logged = step_gradient(student, data, monkeypatch, tmp_path / "packed", micro_batch_tokens=64)
    monkeypatch.setattr("kd_core.train.loop.unpackable", lambda model: "for comparison")
    padded, logged_padded = step_gradient(student, data, monkeypatch, tmp_path / "padded", micro_batch_tokens=64)
    assert_same_gradients(packed, padded, tolerance=1e-6)
    for name in ("loss", "hard", "soft", "gradient_norm"):
        assert logged[name] == pytest.approx(logged_padded[name], rel=1e-5)


@pytest.mark.drill
@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, pytest.param({"compile": True}, marks=COMPILED)])
def test_what_run_asks_for_changes_no_result(student, data, tmp_path, change: dict[str, Any]) -> None:
    plain, other = copy.deepcopy(student), copy.deepcopy(student)
    fit(plain, tmp_path / "plain", data=data)
    result = fit(other, tmp_path / "other", data=data, run=Run(device="cpu", **change))
    assert result.packed is ("compile" not in change)
    assert not other.is_activation_checkpointing
    assert other.get_decoder()._compiled_call_impl is None
    for (name, mine), theirs in zip(weights(other).items(), weights(plain).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_bfloat16_products_move_float32_weights_nearly_alike(student, data, tmp_path) -> None:
    exact, rounded = copy.deepcopy(student), copy.deepcopy(student)
    expected = fit(exact, tmp_path / "exact", data=data).metrics
    found = fit(rounded, tmp_path / "rounded", data=data, training=TRAINING.model_copy(update={"dtype": "bfloat16"})).metrics
    assert {weight.dtype for weight in weights(rounded).values()} == {torch.float32}
    assert found != expected
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.03)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.05)


# ------------------------------------------------------------------------------------------- resume


EVERYTHING = TRAINING.model_copy(
    update={
        "ema_decay": 0.8,
        "validate_every_steps": 1,
        "keep": "best",
        "learning_rate_schedule": ReduceOnPlateau(kind="plateau", patience=1),
        "learning_rate": 0.1,
        "steps": 8,
    }
)


@pytest.mark.parametrize("stop_after", [2, 3, 5])
@pytest.mark.parametrize("training", [TRAINING, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(student, data, monkeypatch, tmp_path, stop_after: int, training: Training) -> None:
    run = Run(device="cpu", checkpoint_every_steps=2)
    data = TrainingData(data.rows, [TokenRow((13, 2, 8, 15, 10, 12, 6, 2), 1)])  # soon gets worse
    unbroken = copy.deepcopy(student)
    expected = fit(unbroken, tmp_path / "unbroken", data=data, run=run, training=training)
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", {"train.step": 0})
        patch.setenv("KD_FAILPOINT", f"train.step:{stop_after}:error")
        with pytest.raises(OSError, match="fail point"):
            fit(copy.deepcopy(student), tmp_path / "broken", data=data, run=run, training=training)
    resumed = copy.deepcopy(student)
    with torch.no_grad():  # whatever the new process starts with is overwritten
        for parameter in resumed.parameters():
            parameter.add_(1.0)
    found = fit(resumed, tmp_path / "broken", data=data, run=run, training=training)
    assert found.resumed_from == stop_after - stop_after % 2
    for name in ("metrics", "validation_nll", "supervised_tokens", "kept_step", "steps", "skipped", "spikes"):
        assert getattr(found, name) == getattr(expected, name), name
    mine, theirs = weights(resumed), weights(unbroken)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    if training is EVERYTHING:
        assert expected.kept_step < 8, "the best weights came from a checkpoint"
        assert expected.metrics[-1]["learning_rate"] < 0.1, "the plateau was met"


def test_two_runs_are_equal_and_two_seeds_are_not(student, data, tmp_path) -> None:
    models = [copy.deepcopy(student) for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (0, 0, 1), strict=True)):
        fit(model, tmp_path / str(i), data=data, seed=seed)
    first, again, other = (weights(model) for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# ------------------------------------------------------------------------------------------- what is learnt


def test_the_teacher_is_a_fixed_point_of_soft_training(tiny_model, tmp_path) -> None:
    """Trap 1: with dense labels and no hard part the teacher's own weights have nothing to learn; a shifted row does."""
    teacher = tiny_model()
    training = Training(steps=1, batch_rows=len(ROWS), learning_rate=0.001, clip_norm=None)
    objective = Objective(supervision="soft", hard_weight=0.0, soft_weight=1.0, temperature=2.0)
    policy = Dense(kind="dense")
    data = TrainingData(MemoryRows(ROWS, targets_of(teacher, ROWS, policy)), ())
    same = copy.deepcopy(teacher.model).requires_grad_(True)
    last = fit(same, tmp_path / "same", data=data, training=training, objective=objective).metrics[-1]
    assert abs(last["loss"]) < 1e-5
    assert last["gradient_norm"] < 1e-3
    moved = [TokenRow(row.ids[:-1], row.first_supervised - 1) for row in ROWS if row.first_supervised > 1]
    shifted = TrainingData(MemoryRows(moved, targets_of(teacher, [r for r in ROWS if r.first_supervised > 1], policy)), ())
    off = fit(
        copy.deepcopy(teacher.model).requires_grad_(True), tmp_path / "off", data=shifted, training=training, objective=objective
    ).metrics[-1]
    assert off["loss"] > 0.1
    assert off["gradient_norm"] > 0.1


def test_the_end_token_is_learnt_though_padding_is_the_end_token(tiny_model, tmp_path) -> None:
    """Trap 4: with pad == eos the probability of the end token after an answer rises, and after a truncated one it does not."""
    loaded = tiny_model(seed=7)
    loaded.model.config.pad_token_id = EOS
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    assert loaded.tokenizer.pad_token_id == EOS
    rows = [TokenRow((3, 14, 5, EOS), 2), TokenRow((4, 14, 6, 6, 6), 2)]  # the second met its limit and carries no end
    model = loaded.model.requires_grad_(True)

    def end_probability(ids: list[int]) -> float:
        with torch.inference_mode():
            return float(torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1, :17], -1)[EOS])

    before = end_probability([3, 14, 5])
    training = Training(steps=60, batch_rows=2, learning_rate=0.02)
    result = fit(model, tmp_path, data=TrainingData(MemoryRows(rows), ()), training=training, objective=HARD)
    assert result.supervised_tokens == 60 * (2 + 3)
    assert before < 0.5 < 0.9 < end_probability([3, 14, 5])
    assert end_probability([4, 14, 6, 6]) < 0.1


def test_the_log_names_the_parts_of_the_objective(student, data, tmp_path) -> None:
    last = fit(student, tmp_path, data=data).metrics[-1]
    assert last["loss"] == pytest.approx(0.3 * last["hard"] + 0.7 * 4.0 * last["soft"], rel=1e-5)
    assert (last["hard_weight"], last["soft_weight"], last["temperature"], last["step"]) == (0.3, 0.7, 2.0, 6)
    assert last["validation_nll"] > 0.0


def test_weight_decay_acts_on_matrices_as_its_schedule_says(student, data, monkeypatch, tmp_path) -> None:
    seen: list[list[float]] = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([group["weight_decay"] for group in self.param_groups if group["params"]])
            assert all((p.ndim >= 2) == (group is self.param_groups[0]) for group in self.param_groups for p in group["params"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    schedule = {"kind": "linear", "start": 0.0, "end": 0.5}
    training = Training(steps=6, batch_rows=3, learning_rate=0.01, weight_decay=schedule)
    metrics = fit(student, tmp_path, data=data, training=training).metrics
    assert seen == [[pytest.approx(decay), 0.0] for decay in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert (metrics[0]["weight_decay"], metrics[-1]["weight_decay"]) == (0.0, 0.5)


def test_validation_is_the_mean_over_supervised_tokens(student) -> None:
    model = ObjectiveModel(student, num_columns=17, divergence=FORWARD_KL)
    sums, count = validation_sums(model.train(), dealt_batches(ROWS, LAYOUT, rank=0, num_ranks=1), LAYOUT).tolist()
    total = 0.0
    with torch.inference_mode():
        for row in ROWS:
            logp_TV = torch.log_softmax(student(input_ids=torch.tensor([row.ids])).logits[0, :, :17].double(), -1)
            total -= sum(float(logp_TV[t - 1, row.ids[t]]) for t in range(row.first_supervised, len(row.ids)))
    assert sums == pytest.approx(total, rel=1e-5)
    assert count == sum(row.num_supervised for row in ROWS)
    assert student.training


def test_the_norms_of_the_parts_are_those_of_objectives_with_that_part_alone(student, data, tmp_path) -> None:
    """Trap 24: what the weights multiply is in the log."""
    first, expected = fit(copy.deepcopy(student), tmp_path / "both", data=data).metrics[0], {}
    for name, objective in {"hard": HARD, "soft": SOFT.model_copy(update={"hard_weight": NONE, "soft_weight": ONE})}.items():
        logged = fit(copy.deepcopy(student), tmp_path / name, data=data, objective=objective).metrics[0]
        expected[name] = logged["gradient_norm"]
        assert "gradient_norm_hard" not in logged
    assert first["gradient_norm_hard"] == pytest.approx(expected["hard"], rel=1e-6)
    assert first["gradient_norm_soft"] == pytest.approx(expected["soft"], rel=1e-6)


def test_measuring_the_norms_of_the_parts_changes_no_weight(student, data, monkeypatch, tmp_path) -> None:
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.2
    models = [copy.deepcopy(student) for _ in range(2)]
    for i, (model, every) in enumerate(zip(models, (1, 100), strict=True)):
        monkeypatch.setattr("kd_core.train.loop._PART_NORMS_EVERY", every)
        fit(model, tmp_path / str(i), data=data)
    first, second = (weights(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_speed_and_memory_are_reported(student, data, tmp_path) -> None:
    (found,) = fit(student, tmp_path, data=data).speed
    assert found["step"] == 6
    assert 0.0 < found["supervised_tokens_per_second"] < found["tokens_per_second"]
    assert 0.0 < found["gemm_share"] < 1.0
    assert found["peak_memory_bytes"] > 2**24


# ------------------------------------------------------------------------------------------- what is kept


def test_the_average_is_the_one_of_the_trajectory(student, data, monkeypatch, tmp_path) -> None:
    trajectory: list[dict[str, torch.Tensor]] = []
    plain = copy.deepcopy(student)
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.train.loop.reach", lambda name: trajectory.append(weights(plain)))
        fit(plain, tmp_path / "plain", data=data)
    averaged = copy.deepcopy(student)
    result = fit(averaged, tmp_path / "average", data=data, training=TRAINING.model_copy(update={"ema_decay": 0.3}))
    expected = weights(student)
    for step, after in enumerate(trajectory):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * after[name] for name, value in expected.items()}
    assert len(trajectory) == 6
    for name, value in weights(averaged).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert result.validation_nll == pytest.approx(nll_of(averaged, data.validation), rel=1e-6)


def nll_of(model: Any, rows: Any) -> float:
    layout = Layout(packed=False, budget_tokens=64, device=torch.device("cpu"))
    batches = dealt_batches(rows, layout, rank=0, num_ranks=1)
    total, count = validation_sums(ObjectiveModel(model, num_columns=17, divergence=FORWARD_KL), batches, layout).tolist()
    return total / count


def test_the_best_weights_are_kept_and_a_run_that_gets_no_better_stops(student, data, tmp_path) -> None:
    """Training on rows 2..4 with a large rate makes the two validation rows worse after a while."""
    rows = TrainingData(MemoryRows(ROWS[2:]), ROWS[:2])
    base = {
        "steps": 40,
        "batch_rows": 3,
        "learning_rate": 0.01,
        "validate_every_steps": 2,
        "learning_rate_schedule": Decay(kind="constant"),
    }
    last, best, early = (copy.deepcopy(student) for _ in range(3))
    plain = fit(last, tmp_path / "last", data=rows, objective=HARD, training=Training(**base))
    kept = fit(best, tmp_path / "best", data=rows, objective=HARD, training=Training(**base, keep="best"))
    stopped = fit(early, tmp_path / "early", data=rows, objective=HARD, training=Training(**base, keep="best", stop_after_validations=3))
    measured = {int(m["step"]): m["validation_nll"] for m in kept.metrics if "validation_nll" in m}
    assert list(measured) == list(range(2, 41, 2))
    assert kept.kept_step == min(measured, key=measured.__getitem__) < 30
    assert kept.validation_nll == measured[kept.kept_step] == pytest.approx(nll_of(best, ROWS[:2]), rel=1e-6)
    assert plain.validation_nll == measured[40] == pytest.approx(nll_of(last, ROWS[:2]), rel=1e-6)
    assert plain.kept_step == 40
    assert stopped.steps == stopped.kept_step + 6 < 40
    assert stopped.metrics[-1]["step"] == stopped.steps


def test_a_step_without_finite_gradients_is_skipped_counted_and_bounded(student, tmp_path) -> None:
    calls = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (float("nan") if len(calls) in (3, 5) else 1.0)

    plain = copy.deepcopy(student)
    student.model.norm.weight.register_hook(poison)
    rows = TrainingData(MemoryRows(ROWS), ())
    training = Training(steps=8, batch_rows=3, learning_rate=0.01, max_skipped_steps=2)
    result = fit(student, tmp_path / "two", data=rows, objective=HARD, training=training)
    assert result.skipped == [3, 5]
    assert [m["skipped_steps"] for m in result.metrics] == [0, 1, 2, 2]
    assert ["gradient_norm" in m for m in result.metrics] == [True, False, False, True]
    assert all(bool(torch.isfinite(value).all()) for value in weights(student).values())
    calls.clear()
    plain.model.norm.weight.register_hook(poison)
    with pytest.raises(TrainingError, match=r"step 5: gradients are not finite \(and at 1 steps before, as training\.max_skipped_steps"):
        fit(plain, tmp_path / "one", data=rows, objective=HARD, training=training.model_copy(update={"max_skipped_steps": 1}))


def test_validations_without_rows_are_refused(student, tmp_path) -> None:
    training = TRAINING.model_copy(update={"validate_every_steps": 2})
    with pytest.raises(TrainingError, match="there are no validation rows"):
        fit(student, tmp_path, data=TrainingData(MemoryRows(ROWS), ()), objective=HARD, training=training)


# ------------------------------------------------------------------------------------------- what is refused


def test_missing_soft_labels_stop_the_run(student, tmp_path) -> None:
    with pytest.raises(SoftLabelError, match="these rows have no soft labels"):
        fit(student, tmp_path, data=TrainingData(MemoryRows(ROWS), ()))


def test_soft_labels_of_a_left_out_row_are_not_shifted_to_another(student, tiny_model, tmp_path) -> None:
    """Rows above max_tokens are dropped; targets are found by the row's own index, so the rest keep theirs."""
    read: list[int] = []
    targets = targets_of(tiny_model(), ROWS, SAMPLED)

    def reading(i: int) -> Any:
        read.append(i)
        return targets(i)

    training = TRAINING.model_copy(update={"max_tokens": 8})
    fit(student, tmp_path, data=TrainingData(MemoryRows(ROWS, reading), ()), training=training)
    assert set(read) == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"run\.micro_batch_tokens"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", r"training\.dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"run\.compile"),
    ],
)
def test_a_launcher_cannot_change_what_is_trained(student, data, tmp_path, monkeypatch, name: str, value: str, instead: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=rf"launched with {name}={value}, .* unset it, and set {instead}"):
        fit(student, tmp_path, data=data)
    monkeypatch.setenv(name, "1" if value == "4" else "NO")
    assert fit(student, tmp_path, data=data).steps == 6


@pytest.mark.parametrize("keep", ["last", "best"])
def test_weights_without_a_finite_validation_loss_are_not_kept(student, data, tmp_path, monkeypatch, keep: str) -> None:
    real = state.validation_sums
    monkeypatch.setattr(state, "validation_sums", lambda *given: real(*given) * math.nan)
    training = TRAINING.model_copy(update={"keep": keep, "validate_every_steps": 3})
    step = {"last": 6, "best": 3}[keep]
    with pytest.raises(
        TrainingError, match=rf"the validation loss after step {step} is not finite: the run diverged; lower training\.learn"
    ):
        fit(student, tmp_path, data=data, training=training)


def test_no_row_within_the_limit_is_refused(student, tmp_path) -> None:
    rows = [TokenRow(tuple(range(2, 12)), 4)]
    training = Training(steps=1, batch_rows=1, learning_rate=0.1, max_tokens=8)
    with pytest.raises(TrainingError, match=r"1 rows, none within training\.max_tokens = 8"):
        fit(student, tmp_path, data=TrainingData(MemoryRows(rows), ()), training=training)


def test_a_diverged_run_ends_with_advice(student, tmp_path) -> None:
    with torch.no_grad():
        student.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: gradients are not finite; lower training\.learning_rate"):
        fit(
            student,
            tmp_path,
            data=TrainingData(MemoryRows(ROWS), ()),
            objective=HARD,
            training=Training(steps=20, batch_rows=2, learning_rate=0.1),
        )


def test_ticks_tell_the_loss_and_the_pace(student: torch.nn.Module, data: TrainingData, tmp_path: Path) -> None:
    ticks: list[Tick] = []
    fit(student, tmp_path, data=data, tick=ticks.append)
    assert [tick.note for tick in ticks if tick.done == 0] == [""]
    assert len(ticks) > 1
    assert all(re.fullmatch(r"loss \d+\.\d{4}, [\d,.]+ rows/s, [\d,.]+ tokens/s", tick.note) for tick in ticks[1:])
