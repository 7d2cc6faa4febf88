import math

import pytest

from kd_core.recipe import Constant, Piecewise, Ramp, Training
from kd_core.train.schedules import learning_rate, value_at


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
