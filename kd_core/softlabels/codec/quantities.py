"""Entropies, gold log-probabilities and top-k log-probabilities as whole numbers, and back.

Axes: N positions, K ids of a top-k position, G temperatures, L levels. Everything that writer and reader must agree on is
rounded once, far from a tie.
"""

import numpy as np
import torch
from torch import Tensor

from kd_core.softlabels.targets import TopKTargets

__all__ = [
    "ENTROPY_STEPS",
    "GOLD_LOGPROB",
    "choose_levels",
    "entropy_of",
    "gold_logprob_of",
    "levels_of",
    "logprob_of_level",
    "quantise_entropy",
    "quantise_gold",
]

ENTROPY_STEPS = 64
"""Steps of a quantised entropy in a nat."""
_GOLD_LOST = 4095  # quantised gold log-probability of -inf
_KL_BUDGET = 1e-4  # nats a position, mean: half of what is promised, as the choice looks at a sample
_KL_KNOWN = 1.3e-4  # with the levels of a known model: those were chosen close to the budget on other rows
_KL_SAMPLE = 1024  # positions
_LEVEL_CHOICES = np.unique(np.rint(2.0 ** np.arange(2, 16.1, 0.125)).astype(np.int64))


def quantise_entropy(entropy_N: Tensor) -> np.ndarray:
    """Entropies in whole steps, int64."""
    return np.asarray(np.rint(np.maximum(entropy_N.double().cpu().numpy(), 0) * ENTROPY_STEPS).astype(np.int64))


def entropy_of(quantised_N: np.ndarray) -> Tensor:
    """Entropies from whole steps, float32, nats."""
    return torch.from_numpy((quantised_N / ENTROPY_STEPS).astype(np.float32))


def quantise_gold(logprob_N: np.ndarray) -> np.ndarray:
    """Gold log-probabilities -x as 32 ln(1 + 4x) rounded, int64: steps of 1/128 nat at 0, of 3% far away."""
    steps_N = np.rint(32 * np.log1p(4 * np.maximum(-logprob_N.astype(np.float64), 0)))
    return np.asarray(np.minimum(steps_N, _GOLD_LOST).astype(np.int64))


GOLD_LOGPROB = np.append(np.maximum(-np.expm1(np.arange(_GOLD_LOST) / 32) / 4, np.finfo(np.float32).min), -np.inf).astype(np.float32)
"""Gold log-probability of each whole number, float32: the inverse of ``quantise_gold``."""


def gold_logprob_of(quantised_N: np.ndarray) -> Tensor:
    """Gold log-probabilities from whole numbers, float32; a number beyond the last stands for -inf."""
    return torch.from_numpy(GOLD_LOGPROB.take(quantised_N, mode="clip"))


def logprob_of_level(num_levels: int, lowest: float, temperatures: tuple[float, ...]) -> np.ndarray:
    """Log-probability that each level stands for, float64, shape (num_levels + 1,)."""
    logprob_L = 2 * max(temperatures) * np.log(np.maximum(np.arange(num_levels + 1), 1) / num_levels)
    logprob_L[0] = lowest
    return logprob_L


def levels_of(logprob_NK: np.ndarray, num_levels: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """Levels of log-probabilities, int64: p^(1/2Tmax) in whole steps, 0 to num_levels."""
    return np.asarray(np.rint(np.exp(logprob_NK / (2 * max(temperatures))) * num_levels).clip(0, num_levels).astype(np.int64))


def _lowest_logprob(logprob_NK: np.ndarray, level_NK: np.ndarray, num_levels: int, temperatures: tuple[float, ...]) -> float:
    """Log of the mean probability at level 0, as float32 holds it; never further than a tenth of a level's width down."""
    rest = np.exp(logprob_NK[level_NK == 0])
    floor = 2 * max(temperatures) * np.log(0.1 / num_levels)
    return float(np.float32(max(floor, np.log(rest.mean())) if rest.any() else floor))


def choose_levels(targets: TopKTargets, known: tuple[int, float] | None) -> tuple[int, float]:
    """Number of levels, and log-probability of level 0, that keep the mean KL within the budget at every temperature.

    Args:
        targets: what they shall serve.
        known: the same two of a model at hand: the result if they serve; None takes the fewest levels that do.
    """
    whole_NK = targets.logprobs_NK.double().cpu().numpy()
    every = max(1, len(whole_NK) // _KL_SAMPLE)
    logprob_NK = whole_NK[::every]
    kept_NG = -np.expm1(targets.log_tail_NG[::every].double().cpu().numpy())

    def divergence(num_levels: int, lowest: float | None = None) -> float:
        level_NK = levels_of(logprob_NK, num_levels, targets.temperatures)
        if lowest is None:
            lowest = _lowest_logprob(logprob_NK, level_NK, num_levels, targets.temperatures)
        found_NK = logprob_of_level(num_levels, lowest, targets.temperatures)[level_NK]
        means = []
        for g, temperature in enumerate(targets.temperatures):
            log_p, log_q = (_log_softmax(part / temperature) for part in (logprob_NK, found_NK))
            means.append((kept_NG[:, g] * (np.exp(log_p) * np.maximum(log_p - log_q, -1e4)).sum(-1)).mean())
        return float(max(means))

    if known is not None and len(logprob_NK) and divergence(*known) <= _KL_KNOWN:
        return known
    low, high = 0, len(_LEVEL_CHOICES) - 1
    while low < high and len(logprob_NK):
        middle = (low + high) // 2
        low, high = (low, middle) if divergence(int(_LEVEL_CHOICES[middle])) <= _KL_BUDGET else (middle + 1, high)
    num_levels = int(_LEVEL_CHOICES[low])
    return num_levels, _lowest_logprob(whole_NK, levels_of(whole_NK, num_levels, targets.temperatures), num_levels, targets.temperatures)


def _log_softmax(x_NK: np.ndarray) -> np.ndarray:
    shifted = x_NK - x_NK.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
