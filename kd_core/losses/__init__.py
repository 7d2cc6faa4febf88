"""Divergences over dense and sparse targets, the weighted objective, and its fused kernel."""

from kd_core.losses.divergences import forward_kl, soft_divergence
from kd_core.losses.fused import Projection, fused_loss
from kd_core.losses.objective import StepWeights, step_weights, supervised_loss

__all__ = ["Projection", "StepWeights", "forward_kl", "fused_loss", "soft_divergence", "step_weights", "supervised_loss"]
