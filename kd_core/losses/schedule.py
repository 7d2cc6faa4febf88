"""Schedules of a loss over the course of training."""

import math

from kd_core.recipe import Constant, Piecewise, Ramp

__all__ = ["value_at"]


def value_at(schedule: Constant | Ramp | Piecewise, share: float) -> float:
    """Value of a schedule at a share (0..1) of the training steps.

    >>> value_at(Ramp(kind="linear", start=4.0, end=2.0), 0.5)
    3.0
    """
    match schedule:
        case Constant():
            return schedule.value
        case Piecewise():
            return schedule.values[sum(share >= at for at in schedule.at)]
        case Ramp():
            bend = share if schedule.kind == "linear" else (1.0 - math.cos(math.pi * share)) / 2.0
            return schedule.start + (schedule.end - schedule.start) * bend
