"""Training on a device gives what training on the CPU gives; nothing of a batch, a checkpoint or a teacher stays behind on the CPU."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.progress import silent
from kd_core.recipe import (
    BlockPair,
    Dense,
    HiddenStateFeatures,
    HiddenStates,
    Objective,
    RelationFeatures,
    Run,
    Sampled,
    SoftLabels,
    TopK,
    TotalVariation,
    Training,
)
from kd_core.softlabels.capture import score_rows
from kd_core.softlabels.hidden import RowStates, capture_hidden
from kd_core.store import LocalStore
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.features import CachedStates, FeatureTask, LiveTeacher
from kd_core.train.loop import TrainingResult, train
from kd_core.train.row_order import MemoryRows, TrainingData

EOS = 1
ROWS = [
    TokenRow((9, 12, 7, 14, 9, 12, 7, 14, 3, 4, EOS), 4),
    TokenRow((3, 14, EOS), 2),
    TokenRow((5, 6, 7, 8, 9, 10, 11, EOS), 1),
    TokenRow((4, 4, 14, 3, EOS), 3),
    TokenRow((16, 2, 13, 14, 2, 2, 2, 2, 2, 2, 2, 2, 2, EOS), 4),
]
KEYED = [(f"{number:032x}", row) for number, row in enumerate(ROWS)]
POLICIES: list[SoftLabels] = [
    Sampled(kind="sampled", num_draws=9, temperature=2.0),
    TopK(kind="topk", k=4, temperatures=(1.0, 2.0)),
    Dense(kind="dense"),
]
SOFT = Objective(supervision="soft", hard_weight=0.3, soft_weight=0.7, temperature=2.0)
TRAINING = Training(steps=6, batch_rows=3, learning_rate=0.01, warmup_steps=2)
PAIRS = (BlockPair(student=0, teacher=1), BlockPair(student=1, teacher=2))
HIDDEN = HiddenStateFeatures(kind="hidden_states", source="live", weight=0.5)

OTHERS = [pytest.param("pretended", marks=pytest.mark.pretended), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Than the CPU, which the other tests are about."""
ON_OTHERS = pytest.mark.parametrize("device", OTHERS, indirect=True)

Fit = Callable[..., tuple[TrainingResult, dict[str, torch.Tensor]]]


@pytest.fixture
def fit(tiny_model, tmp_path: Path) -> Fit:
    """Trains one and the same student; what was logged, and its weights on the CPU."""
    student = tiny_model(seed=7, vocab_size=20).model.requires_grad_(True)

    def run(settings: Run, data: TrainingData, *, at: str, **changes: Any) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
        model = copy.deepcopy(student)
        store = LocalStore(tmp_path / at)
        given = {"training": TRAINING, "objective": SOFT, "seed": 0, "num_columns": 17, "tick": silent} | changes
        result = train(model, data, run=settings, checkpoints=Checkpoints(store, "f" * 32), **given)
        return result, {name: weight.detach().cpu() for name, weight in model.state_dict().items()}

    return run


def alike(found: tuple[TrainingResult, dict[str, torch.Tensor]], expected: tuple[TrainingResult, dict[str, torch.Tensor]]) -> None:
    """float32 sums in another order, over six steps of AdamW."""
    for mine, theirs in zip(found[0].metrics, expected[0].metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0.0, atol=1e-4, msg=name)


def soft(teacher: LoadedModel, policy: SoftLabels) -> TrainingData:
    scored = score_rows(teacher, KEYED, policy=policy, micro_batch_tokens=64).scored
    return TrainingData(MemoryRows(ROWS, lambda number: scored[number].targets), ROWS[:2])


@ON_OTHERS
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_training_is_what_it_is_on_the_cpu(
    tiny_model, fit: Fit, runs_on: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, policy: SoftLabels, packed: bool
) -> None:
    """Train with validations, an average of the weights, the best of them kept, and a checkpoint every other step."""
    if not packed:
        monkeypatch.setattr("kd_core.train.reading.unpackable", lambda model: "for this test")
    data = soft(tiny_model(), policy)
    training = TRAINING.model_copy(update={"validate_every_steps": 2, "keep": "best", "ema_decay": 0.8})
    found = fit(runs_on("device").model_copy(update={"checkpoint_every_steps": 2}), data, at="device", training=training)
    alike(found, fit(runs_on("cpu"), data, at="cpu", training=training))
    assert found[0].packed == packed


@ON_OTHERS
@pytest.mark.parametrize("policy", POLICIES[1:], ids=lambda policy: policy.kind)
def test_bfloat16_products_and_another_divergence(tiny_model, fit: Fit, runs_on: Callable[[str], Run], policy: SoftLabels) -> None:
    objective = SOFT.model_copy(update={"divergence": TotalVariation(kind="total_variation")})
    data, training = soft(tiny_model(), policy), TRAINING.model_copy(update={"dtype": "bfloat16"})
    found, expected = (fit(runs_on(where), data, at=where, training=training, objective=objective)[0] for where in ("device", "cpu"))
    assert found.metrics[-1]["loss"] == pytest.approx(expected.metrics[-1]["loss"], rel=0.03)


class States:
    """Captured states in memory."""

    def __init__(self, states: list[RowStates]) -> None:
        self._states = states

    def prefetch(self, numbers: Any, *, soft: bool) -> None: ...

    def expect(self, numbers: Any) -> None: ...

    def read(self, numbers: Any) -> list[TokenRow]:
        return [ROWS[number] for number in numbers]

    def states(self, numbers: Any) -> list[RowStates]:
        return [self._states[number] for number in numbers]


@ON_OTHERS
@pytest.mark.parametrize("source", ["live", "cached", "relations"])
def test_features_are_what_they_are_on_the_cpu(tiny_model, fit: Fit, runs_on: Callable[[str], Run], source: str) -> None:
    """The live teacher is loaded on the CPU and moves to where the student is."""
    features = RelationFeatures(kind="relations", num_heads=4, weight=0.5) if source == "relations" else HIDDEN
    results = []
    for where in ("device", "cpu"):
        teacher = tiny_model(num_layers=3)
        if source == "cached":
            captured = capture_hidden(teacher, KEYED, wanted=HiddenStates(blocks=(1, 2)), micro_batch_tokens=64).captured
            found: Any = CachedStates(States([row.states for row in captured]), PAIRS)
        else:
            found = LiveTeacher(teacher, features, PAIRS)
        objective, task = SOFT.model_copy(update={"features": features}), FeatureTask(features, PAIRS, found)
        data = soft(tiny_model(num_layers=3), POLICIES[0])
        results.append(fit(runs_on(where), data, at=where, objective=objective, features=task))
    alike(*results)
    assert results[0][0].metrics[-1]["feature"] > 0.0


@ON_OTHERS
def test_a_checkpoint_goes_to_the_device_and_back(
    tiny_model, fit: Fit, runs_on: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun on either device and finished on the other one: the run of the CPU, with the average and the best weights so far."""
    training = TRAINING.model_copy(update={"validate_every_steps": 1, "keep": "best", "ema_decay": 0.8})
    data = soft(tiny_model(), POLICIES[0])

    def run(where: str, at: str) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
        return fit(runs_on(where).model_copy(update={"checkpoint_every_steps": 2}), data, at=at, training=training)

    expected = run("cpu", "unbroken")
    for begins, ends in [("cpu", "device"), ("device", "cpu"), ("device", "device")]:
        with monkeypatch.context() as patch:
            patch.setattr("kd_core.failpoints._reached", {"train.step": 0})
            patch.setenv("KD_FAILPOINT", "train.step:5:error")
            with pytest.raises(OSError, match="fail point"):
                run(begins, f"{begins} to {ends}")
        found = run(ends, f"{begins} to {ends}")
        assert found[0].resumed_from == 4
        alike(found, expected)


@pytest.mark.pretended
@pytest.mark.parametrize("device", ["pretended"], indirect=True)
@pytest.mark.parametrize(("policy", "most"), [(POLICIES[0], 5), (POLICIES[1], 2), (POLICIES[2], 2)], ids=["sampled", "topk", "dense"])
def test_a_step_waits_for_the_device_at_its_end_only(
    tiny_model, fit: Fit, waits: Counter[str], runs_on: Callable[[str], Run], policy: SoftLabels, most: int
) -> None:
    """Numbers that are logged are waited for, and the gradient's norm, which decides whether weights move; sampled labels, whose
    entries lie at other places in each micro-batch, once more in each of three.
    """
    data, counted = soft(tiny_model(), policy), []
    for steps in (3, 8):
        settings = runs_on("device").model_copy(update={"micro_batch_tokens": 24})
        training = Training(steps=steps, batch_rows=5, learning_rate=0.01)
        waits.clear()
        fit(settings, data, at=str(steps), training=training)
        counted.append(Counter(waits))
    more = counted[1] - counted[0]
    assert 0 < sum(more.values()) <= 5 * most, more
