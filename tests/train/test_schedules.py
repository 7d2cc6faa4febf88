import math

import pytest

from kd_core.losses.schedule import value_at
from kd_core.recipe import Constant, Piecewise, Ramp, Training
from kd_core.train.schedules import best_validation, learning_rate, weight_decay, without_a_best


def test_values_by_hand() -> None:
    assert value_at(Constant(kind="constant", value=0.3), 0.7) == 0.3
    linear = Ramp(kind="linear", start=1.0, end=3.0)
    assert [value_at(linear, share) for share in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]
    cosine = Ramp(kind="cosine", start=1.0, end=3.0)
    assert [value_at(cosine, share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 2.0, 3.0])
    assert value_at(cosine, 0.25) == pytest.approx(2.0 - math.cos(math.pi / 4))


def test_pieces_change_at_their_shares() -> None:
    pieces = Piecewise(kind="piecewise", values=(4.0, 2.0, 1.0), at=(0.25, 0.5))
    assert [value_at(pieces, share) for share in (0.0, 0.2499, 0.25, 0.49, 0.5, 1.0)] == [4.0, 4.0, 2.0, 2.0, 1.0, 1.0]
    assert value_at(Piecewise(kind="piecewise", values=(7.0,), at=()), 0.5) == 7.0


def test_the_learning_rate_warms_up_and_ends_at_its_share() -> None:
    training = Training(steps=11, batch_rows=1, learning_rate=0.1, warmup_steps=4, final_learning_rate=0.2)
    rates = [learning_rate(training, step) for step in range(11)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[7] == pytest.approx(0.1 * (0.2 + 0.8 * 0.5))
    assert rates[10] == pytest.approx(0.02)


def test_one_step_and_all_but_one_of_warm_up() -> None:
    one = Training(steps=1, batch_rows=1, learning_rate=0.1)
    assert learning_rate(one, 0) == pytest.approx(0.1)
    warm = Training(steps=3, batch_rows=1, learning_rate=0.1, warmup_steps=2)
    assert [learning_rate(warm, step) for step in range(3)] == pytest.approx([0.05, 0.1, 0.1])


def rates(kind: str, **others: object) -> list[float]:
    training = Training(
        steps=11, batch_rows=1, learning_rate=0.1, warmup_steps=1, final_learning_rate=0.2, learning_rate_schedule={"kind": kind, **others}
    )
    return [learning_rate(training, step) for step in range(11)]


def test_other_schedules_by_hand() -> None:
    assert rates("constant") == [0.1] * 11
    assert rates("linear") == pytest.approx([0.1, *(0.1 * (1.0 - 0.8 * i / 9) for i in range(10))])
    assert rates("warmup_stable_decay", decay_share=0.4) == pytest.approx([0.1] * 7 + [0.08, 0.06, 0.04, 0.02])


def test_a_plateau_lowers_the_rate_each_time_it_is_met_and_not_below_its_floor() -> None:
    training = Training(
        steps=100,
        batch_rows=1,
        learning_rate=1.0,
        validate_every_steps=1,
        learning_rate_schedule={"kind": "plateau", "factor": 0.5, "patience": 2},
    )
    losses = [5.0, 4.0, 4.1, 4.0, 4.2, 4.3, 3.9, 4.0, 4.0, 4.0, 4.0]  # an equal loss is no new best
    found = [learning_rate(training, step, list(enumerate(losses[:step], 1))) for step in range(12)]
    assert found == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.1]


def test_the_best_validation_is_the_first_of_equals() -> None:
    validation = [(10, 3.0), (20, 2.0), (30, 2.0), (40, 2.5)]
    assert (best_validation(validation), without_a_best(validation)) == ((20, 2.0), 2)
    assert (best_validation([]), without_a_best([]), without_a_best(validation[:2])) == (None, 0, 0)


@pytest.mark.parametrize("field", [{"keep": "best"}, {"stop_after_validations": 2}, {"learning_rate_schedule": {"kind": "plateau"}}])
def test_what_goes_by_validations_needs_some(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="goes by validations while training; set validate_every_steps"):
        Training(steps=9, batch_rows=1, learning_rate=0.1, **field)
    Training(steps=9, batch_rows=1, learning_rate=0.1, validate_every_steps=3, **field)


def test_weight_decay_is_a_number_or_a_schedule_over_all_steps() -> None:
    steady = Training(steps=5, batch_rows=1, learning_rate=0.1, weight_decay=0.1)
    assert [weight_decay(steady, step) for step in range(5)] == [0.1] * 5
    pieces = {"kind": "piecewise", "values": [0.0, 0.2], "at": [0.5]}
    stepped = Training(steps=5, batch_rows=1, learning_rate=0.1, warmup_steps=1, weight_decay=pieces)
    assert [weight_decay(stepped, step) for step in range(5)] == [0.0, 0.0, 0.2, 0.2, 0.2]


def test_a_constant_weight_decay_is_written_as_its_number() -> None:
    """Recipes of before the schedules keep their fingerprints."""
    spelt = {"kind": "constant", "value": 0.1}
    for value in (0.1, spelt):
        dumped = Training(steps=5, batch_rows=1, learning_rate=0.1, weight_decay=value).model_dump(mode="json")
        assert dumped["weight_decay"] == 0.1
        assert Training.model_validate(dumped).weight_decay == Constant(**spelt)
    ramp = {"kind": "linear", "start": 0.0, "end": 0.2}
    dumped = Training(steps=5, batch_rows=1, learning_rate=0.1, weight_decay=ramp).model_dump(mode="json")
    assert dumped["weight_decay"] == ramp


def test_a_negative_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Training(steps=5, batch_rows=1, learning_rate=0.1, weight_decay=-0.1)
