"""Stored against live: what the codec and rounding do is within the bounds, another teacher is not."""

import numpy as np
import pytest
import torch

from kd_core.cache.parity import _BOUNDS, compare
from kd_core.recipe import Dense, Sampled, TopK
from kd_core.softlabels import Targets, make_targets
from kd_core.softlabels.codec import decode_rows, encode_rows, parse_model

POLICIES = [
    Sampled(kind="sampled", num_draws=25, temperature=2.0),
    TopK(kind="topk", k=16, temperatures=(1.0, 2.0)),
    Dense(kind="dense"),
]
BOUNDS = _BOUNDS[torch.float32]
NUM, COLUMNS = 64, 500
LABELS_N = torch.arange(NUM) * 7
UNIFORM_N = torch.rand(NUM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def logits(seed: int = 0) -> torch.Tensor:
    return 4.0 * torch.randn(NUM, COLUMNS, generator=torch.Generator().manual_seed(seed))


def targets(policy, logits_NV: torch.Tensor) -> Targets:
    return make_targets(logits_NV, LABELS_N, policy, uniform_N=UNIFORM_N)


def stored(policy, logits_NV: torch.Tensor) -> Targets:
    """Through the codec and back."""
    gold = [LABELS_N.numpy()]
    model, blobs = encode_rows([targets(policy, logits_NV)], gold)
    return decode_rows(parse_model(model), blobs, gold)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_the_same_teacher_is_within_the_bounds(policy) -> None:
    noise = 1e-5 * torch.randn(NUM, COLUMNS, generator=torch.Generator().manual_seed(9))
    gold, variation, same = compare(stored(policy, logits()), targets(policy, logits() + noise))
    assert gold <= BOUNDS.gold_error
    assert variation <= BOUNDS.total_variation
    assert same >= 0.95
    exact = targets(policy, logits())
    assert compare(exact, exact) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_another_teacher_is_not(policy) -> None:
    """Dropout of a tenth on the logits: no crash, no NaN, and every label a little wrong."""
    kept_NV = (torch.rand(NUM, COLUMNS, generator=torch.Generator().manual_seed(3)) > 0.1) / 0.9
    gold, variation, same = compare(stored(policy, logits()), targets(policy, logits() * kept_NV))
    assert gold > 5 * BOUNDS.gold_error
    assert variation > 5 * BOUNDS.total_variation
    assert same < BOUNDS.same_ids or policy.kind == "dense"  # which keeps all ids whoever teaches


def test_by_hand() -> None:
    """Two positions of three columns; at the second the draws fell one id apart."""
    one = torch.tensor([[0.0, -30.0, -30.0], [0.0, -30.0, -30.0]])
    two = torch.tensor([[0.0, -30.0, -30.0], [-30.0, 0.0, -30.0]])
    policy, labels_N, uniform_N = Sampled(kind="sampled", num_draws=4, temperature=1.0), torch.tensor([0, 0]), torch.full((2,), 0.5)
    a, b = (make_targets(logits_NV, labels_N, policy, uniform_N=uniform_N.double()) for logits_NV in (one, two))
    gold, variation, same = compare(a, b)
    assert (variation, same) == (0.5, 0.5)
    assert gold == pytest.approx(30 / 31)
    assert np.isclose(compare(b, a)[0], 30.0)
