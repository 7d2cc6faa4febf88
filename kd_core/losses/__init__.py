"""Divergences over dense and sparse targets, and the weighted objective."""

from kd_core.losses.divergences import forward_kl
from kd_core.losses.objective import StepWeights, step_weights, supervised_loss

__all__ = ["StepWeights", "forward_kl", "step_weights", "supervised_loss"]
