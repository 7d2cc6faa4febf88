"""Schedules as pure functions of the step and of the validation losses so far: no state of their own to save.

A validation is (optimiser steps done, loss in nats a token); their list is part of a checkpoint, and what a plateau schedule,
early stopping and the best weights do follows from it.
"""

import math
from collections.abc import Sequence

from kd_core.losses.schedule import value_at
from kd_core.recipe import Decay, ReduceOnPlateau, Training, WarmupStableDecay

__all__ = ["Validations", "best_validation", "learning_rate", "reductions", "weight_decay", "without_a_best"]

Validations = Sequence[tuple[int, float]]


def learning_rate(training: Training, step: int, validation: Validations = ()) -> float:
    """Linear warm-up to the peak, then the schedule.

    Args:
        training: peak, warm-up, schedule, steps.
        step: 0-based.
        validation: losses measured before this step; only a plateau schedule looks at them.

    >>> training = Training(steps=5, batch_rows=1, learning_rate=1.0, final_learning_rate=0.0)
    >>> [round(learning_rate(training, step), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    schedule, low = training.learning_rate_schedule, training.final_learning_rate
    match schedule:
        case Decay():
            share = (step - training.warmup_steps) / max(1, training.steps - 1 - training.warmup_steps)
            if schedule.kind == "constant":
                return training.learning_rate
            height = 1.0 - share if schedule.kind == "linear" else (1.0 + math.cos(math.pi * share)) / 2.0
        case WarmupStableDecay():
            falling = schedule.decay_share * (training.steps - 1)
            height = min(1.0, (training.steps - 1 - step) / max(1.0, falling))
        case ReduceOnPlateau():
            return training.learning_rate * max(low, schedule.factor ** reductions(validation, schedule.patience))
    return training.learning_rate * (low + (1.0 - low) * height)


def weight_decay(training: Training, step: int) -> float:
    """Weight decay at a step (0-based): its schedule runs over all steps, warm-up included.

    >>> training = Training(steps=3, batch_rows=1, learning_rate=1.0, weight_decay={"kind": "linear", "start": 0.0, "end": 0.2})
    >>> [weight_decay(training, step) for step in range(3)]
    [0.0, 0.1, 0.2]
    """
    return value_at(training.weight_decay, step / max(1, training.steps - 1))


def best_validation(validation: Validations) -> tuple[int, float] | None:
    """Find (step, loss) of the least loss, the first of equals; None without any."""
    return min(validation, key=lambda found: found[1], default=None)


def without_a_best(validation: Validations) -> int:
    """Validations since the best one.

    >>> without_a_best([(10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0)])
    2
    """
    best = best_validation(validation)
    return 0 if best is None else sum(step > best[0] for step, _ in validation)


def reductions(validation: Validations, patience: int) -> int:
    """Count how often ``patience`` validations in a row brought no new best; the count starts anew after each time.

    >>> reductions([(1, 3.0), (2, 3.1), (3, 3.2), (4, 3.3), (5, 2.0), (6, 2.1)], 2)
    1
    """
    found, waited, best = 0, 0, math.inf
    for _, loss in validation:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited == patience:
            found, waited = found + 1, 0
    return found
