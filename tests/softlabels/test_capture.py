"""The scoring pass equals a direct forward of the teacher, whatever shares the batch, cut to the tokenizer first."""

import os
import subprocess
import sys

import pytest
import torch

from kd_core.errors import TeacherError
from kd_core.recipe import Dense, Sampled
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.softlabels.targets import DenseTargets, SampledTargets
from kd_core.train.data import TokenRow

DENSE = Dense(kind="dense")
ROWS = [
    TokenRow((9, 12, 7, 14, 9, 12, 7, 14, 3, 4, 1), 4),
    TokenRow((3, 14, 1), 2),
    TokenRow((5, 6, 7, 8, 9, 10, 11, 1), 1),
    TokenRow((5, 6, 7, 8, 9, 10, 11, 1), 7),
]
KEYED = [(row_key("n", row), row) for row in ROWS]


def direct_logprobs(loaded, row: TokenRow, columns: int) -> torch.Tensor:
    """log p(. | ids[:t]) at each supervised t, one unpadded row at a time, in float64."""
    with torch.inference_mode():
        logits_TV = loaded.model(input_ids=torch.tensor([row.ids], device=loaded.device)).logits[0]
    return torch.log_softmax(logits_TV[row.first_supervised - 1 : -1, :columns].double().cpu(), -1)


@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_capture_is_the_teachers_log_softmax(tiny_model, device: torch.device, budget: int) -> None:
    loaded = tiny_model()
    loaded.model.to(device)
    for (_, row), scored in zip(KEYED, score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=budget), strict=True):
        assert isinstance(scored.targets, DenseTargets)
        exact_NV = direct_logprobs(loaded, row, loaded.num_columns)
        assert len(exact_NV) == row.num_supervised
        torch.testing.assert_close(scored.targets.logprobs_NV.cpu().double(), exact_NV, atol=2e-5, rtol=0)
        labels_N = torch.tensor(row.ids[row.first_supervised :])
        gold_N = exact_NV.gather(-1, labels_N[:, None])[:, 0]
        torch.testing.assert_close(scored.targets.common.gold_logprob_N.cpu().double(), gold_N, atol=2e-5, rtol=0)


def test_the_vocabulary_is_cut_before_it_is_normalised(tiny_model) -> None:
    """Trap 6: with the padded columns left in, 17 columns hold less than all the mass."""
    loaded = tiny_model(vocab_size=24)
    row = KEYED[0]
    (scored,) = score_rows(loaded, [row], policy=DENSE, micro_batch_tokens=64)
    assert isinstance(scored.targets, DenseTargets)
    assert scored.targets.logprobs_NV.shape[-1] == loaded.num_columns == 17
    torch.testing.assert_close(scored.targets.logprobs_NV.exp().sum(-1), torch.ones(row[1].num_supervised))
    uncut_NV = direct_logprobs(loaded, row[1], 24)[:, :17]
    assert float((scored.targets.logprobs_NV.double() - uncut_NV).abs().max()) > 0.01


def test_draws_follow_the_key_and_not_the_batch(tiny_model) -> None:
    loaded = tiny_model()
    policy = Sampled(kind="sampled", num_draws=7, temperature=2.0)

    def drawn(rows, budget):
        found = {s.key: s.targets for s in score_rows(loaded, rows, policy=policy, micro_batch_tokens=budget)}
        assert all(isinstance(t, SampledTargets) for t in found.values())
        return {key: (t.ids_E.tolist(), t.counts_E.tolist()) for key, t in found.items()}

    assert drawn(KEYED, 1000) == drawn(KEYED[::-1], 1)
    other = [(row_key("another namespace", row), row) for row in ROWS]
    assert list(drawn(KEYED, 1000).values()) != list(drawn(other, 1000).values())


def test_a_teacher_in_training_mode_is_refused(tiny_model) -> None:
    loaded = tiny_model()
    loaded.model.train()
    with pytest.raises(TeacherError, match="not in eval mode"):
        score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=64)


def test_keys_differ_for_each_row_and_namespace() -> None:
    keys = [key for key, _ in KEYED]
    assert len({*keys, row_key("other", ROWS[0])}) == len(keys) + 1


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_keys_are_equal_across_processes(hash_seed: str) -> None:
    """Trap 17: Python salts hash() by process; ours must not notice."""
    code = f"from kd_core.row_keys import soft_label_key\nprint(soft_label_key('n', {ROWS[0].ids!r}, {ROWS[0].first_supervised}))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == KEYED[0][0]
