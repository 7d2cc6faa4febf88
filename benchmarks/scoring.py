"""Teacher-forced scoring: our capture beside what a script does with transformers, same rows, same k.

Axes: B rows, T tokens, N supervised positions, K ids kept, H hidden size, V vocabulary columns.

The peer pads batches of eight rows as they come, runs the whole head in float32, takes log_softmax and topk of every
position. Ours runs in bfloat16, so its distributions differ; the mean KL between the two is measured here and bounded.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import Check, Figure, Goal, figure, in_turn, matmul_flops, timings
from kd_core.recipe import Sampled, SoftLabels, TopK
from kd_core.softlabels.capture import Scores, row_key, score_rows
from kd_core.softlabels.targets import TopKTargets, concatenate
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow

__all__ = ["run"]

_K = 128
_KL_BOUND = 0.005
"""Mean over positions of KL(float32 peer || ours), nats: bfloat16 weights' and activations' rounding."""
_GEMM = (1024, 1024, 1024)
_PEER_ROWS = 8


@torch.inference_mode()
def _padded(model: PreTrainedModel, rows: list[TokenRow], num_columns: int) -> tuple[Tensor, Tensor]:
    """The peer: ids and log-probabilities (N, K) of the supervised positions, in order."""
    ids, logprobs = [], []
    for start in range(0, len(rows), _PEER_ROWS):
        part = rows[start : start + _PEER_ROWS]
        width = max(len(row.ids) for row in part)
        input_ids_BT, mask_BT = torch.zeros(len(part), width, dtype=torch.int64), torch.zeros(len(part), width, dtype=torch.int64)
        for b, row in enumerate(part):
            input_ids_BT[b, : len(row.ids)], mask_BT[b, : len(row.ids)] = torch.tensor(row.ids), 1
        logits_BTV = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits[..., :num_columns]
        top = torch.log_softmax(logits_BTV.float(), -1).topk(_K, -1)
        for b, row in enumerate(part):
            kept = slice(row.first_supervised - 1, len(row.ids) - 1)
            ids.append(top.indices[b, kept])
            logprobs.append(top.values[b, kept])
    return torch.cat(ids), torch.cat(logprobs)


def _kl(ids_NK: Tensor, logprobs_NK: Tensor, ours: TopKTargets) -> float:
    """Mean KL(peer || ours) over the ids both kept and one bucket for all others."""
    num, columns = len(ids_NK), ours.common.num_columns
    mine_NV = torch.full((num, columns), -torch.inf)
    mine_NV.scatter_(-1, ours.ids_NK.long(), ours.logprobs_NK)
    q_NK = mine_NV.gather(-1, ids_NK).double()
    both_NK = torch.isfinite(q_NK)
    p_NK = torch.where(both_NK, logprobs_NK.double().exp(), 0.0)
    rest_p, rest_q = ((1.0 - x.sum(-1)).clamp(min=1e-12) for x in (p_NK, torch.where(both_NK, q_NK.exp(), 0.0)))
    inside = torch.where(both_NK, p_NK * (logprobs_NK.double() - q_NK), 0.0).sum(-1)
    return float((inside + rest_p * (rest_p / rest_q).log()).mean())


def _flops(model: PreTrainedModel, rows: list[TokenRow]) -> float:
    """Multiply-adds times two: the blocks' matrices for all tokens, causal attention, the head for supervised positions."""
    config = model.config
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    tokens, supervised = sum(len(row.ids) for row in rows), sum(row.num_supervised for row in rows)
    pairs = sum(len(row.ids) ** 2 / 2 for row in rows)
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    return 2.0 * blocks * tokens + attention + 2.0 * config.hidden_size * config.vocab_size * supervised


def _whole(scores: Scores) -> TopKTargets:
    whole = concatenate([row.targets for row in scores.scored])
    assert isinstance(whole, TopKTargets)
    return whole


def run(loaded: LoadedModel, rows: list[TokenRow], *, label: str, goal: Goal | None, repeats: int) -> list[Figure]:
    """Tokens a second, all tokens of the rows counted, one thread."""
    keyed = [(row_key("benchmark", row), row) for row in rows]
    in_float32 = copy.deepcopy(loaded.model).float()
    tokens, flops = sum(len(row.ids) for row in rows), _flops(loaded.model, rows)
    gemm = matmul_flops(_GEMM, torch.bfloat16)

    def ours(policy: SoftLabels) -> Scores:
        return score_rows(loaded, keyed, policy=policy, micro_batch_tokens=2048)

    topk, sampled = TopK(kind="topk", k=_K, temperatures=(1.0,)), Sampled(kind="sampled", num_draws=25, temperature=1.0)
    kl = _kl(*_padded(in_float32, rows, loaded.num_columns), _whole(ours(topk)))
    timed_topk, timed_sampled, theirs = in_turn(
        lambda: ours(topk), lambda: ours(sampled), lambda: _padded(in_float32, rows, loaded.num_columns), repeats=repeats
    )
    figures = []
    for policy, mine in (("topk k = 128", timed_topk), ("sampled N = 25", timed_sampled)):
        fraction = flops / mine.process / gemm
        text = (
            f"mean KL(peer || ours) {kl:.1e}, bound {_KL_BOUND:g}; {fraction:.2f} of this run's bfloat16 GEMM rate "
            f"({gemm / 1e9:,.0f} GFLOP/s, {'x'.join(map(str, _GEMM))}); {timings(mine, theirs)}"
        )
        peer = f"transformers, padded batch {_PEER_ROWS}, float32, log_softmax + topk {_K}"
        check = Check(text, 0 <= kl <= _KL_BOUND)
        name = f"scoring, {policy}, {label}, {len(rows)} rows"
        figures.append(figure(name, tokens / mine.process, "tokens/s", check, peer=peer, peer_value=tokens / theirs.process, goal=goal))
    return figures
