"""Schedules as pure functions of the step: nothing to save, nothing to restore."""

import math

from kd_core.recipe import Constant, Piecewise, Ramp, Training

__all__ = ["learning_rate", "value_at"]


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


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up to the peak, then cosine to ``final_learning_rate`` of it at the last step.

    Args:
        training: peak, warm-up, steps.
        step: 0-based.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    share = (step - training.warmup_steps) / max(1, training.steps - 1 - training.warmup_steps)
    low = training.final_learning_rate
    return training.learning_rate * (low + (1.0 - low) * (1.0 + math.cos(math.pi * share)) / 2.0)
