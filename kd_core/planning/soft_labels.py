"""Costs of soft labels under this recipe's policy and under denser and sparser ones, before the teacher runs.

Owns the estimate of one policy and the choice of policies to show beside it: only such as the recipe's objective could be
trained on. The teacher reads the same tokens whatever is kept of it, so one rate serves all. Needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kd_core.planning.costs import (
    epoch_requests,
    forward_seconds,
    measured_seconds,
    price,
    row_groups,
    soft_label_bytes,
    table_bytes,
    write_requests,
)
from kd_core.planning.known import Known
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK, schedule_values

__all__ = ["ScoringRate", "SoftLabelOption", "bytes_factor", "estimate", "scoring_rate", "soft_label_options"]

_DRAWS = 25
"""Beat 50 independent draws on average: the measure for recipes that sample nothing."""
_MAX_DRAWS = 65_535
_TOPK = (32, 128)


@dataclass(frozen=True)
class ScoringRate:
    """Rate at which the teacher scores.

    Attributes:
        tokens_per_second: prompts included.
        source: recipe: run.score_tokens_per_second. measured: by finished records of this store. arithmetic: from the
            teacher's parameters and an assumed rate of this machine.
    """

    tokens_per_second: float
    source: Literal["recipe", "measured", "arithmetic"]


@dataclass(frozen=True)
class SoftLabelOption:
    """Costs of one policy, from where the store stands now. None is unknown.

    Attributes:
        policy: its fields.
        chosen: whether it is the recipe's own.
        rows: asked for.
        rows_cached: of them, in the store under this policy.
        tokens: supervised positions to score.
        bytes_a_token: to store, a supervised position, with the plain columns beside the targets.
        bytes: to add to the store.
        write_requests: to the store, for shards and commits.
        epoch_requests: reads of row groups and footers, for every epoch of training over all rows.
        seconds: of the scoring pass.
        price: of those seconds and writes; None if the recipe states neither price.
        price_a_month: of keeping what is added; None if the recipe states no such price.
    """

    policy: dict[str, Any]
    chosen: bool
    rows: int | None
    rows_cached: int
    tokens: int | None
    bytes_a_token: float | None
    bytes: int | None
    write_requests: int | None
    epoch_requests: int | None
    seconds: float | None
    price: float | None
    price_a_month: float | None


def soft_label_options(known: Known) -> tuple[SoftLabelOption, ...]:
    """Estimate the recipe's policy among sparser and denser ones, by bytes a token; empty where it uses no soft labels."""
    chosen = known.basis.recipe.soft_labels
    if chosen is None or "soft_labels" not in known.basis.nodes:
        return ()
    options = [estimate(known, policy) for policy in _policies(known, chosen)]
    return tuple(sorted(options, key=lambda option: float("inf") if option.bytes_a_token is None else option.bytes_a_token))


def _policies(known: Known, chosen: SoftLabels) -> Iterator[SoftLabels]:
    """List the chosen policy; sampled with half, as many and twice the draws, top-k and dense, as far as the objective could use them."""
    used = schedule_values(known.basis.recipe.objective.temperature)
    found: list[SoftLabels] = [Dense(kind="dense", max_refused_rows=chosen.max_refused_rows)]
    if used is not None:
        grid = chosen.temperatures if isinstance(chosen, TopK) else tuple(sorted(set(used)))
        columns = known.sizes.num_columns or max(_TOPK)
        topk = TopK(kind="topk", k=1, temperatures=grid, max_refused_rows=chosen.max_refused_rows)
        found += [topk.model_copy(update={"k": k}) for k in _TOPK if k <= columns]
    if used is not None and len(set(used)) == 1:
        draws = chosen.num_draws if isinstance(chosen, Sampled) else _DRAWS
        sampled = Sampled(kind="sampled", num_draws=draws, temperature=used[0], max_refused_rows=chosen.max_refused_rows)
        found += [sampled.model_copy(update={"num_draws": n}) for n in (draws // 2, draws, 2 * draws) if 0 < n <= _MAX_DRAWS]
    yield chosen
    yield from (policy for policy in found if policy != chosen)


def estimate(known: Known, policy: SoftLabels) -> SoftLabelOption:
    """Estimate what one policy would cost, for the rows that the store does not hold under it."""
    run, cached, each = known.basis.recipe.run, known.cached.soft_labels(policy), known.lengths.row_tokens
    rows = None if cached.rows is None else cached.rows - cached.cached
    missing = cached.missing_tokens
    if missing is None and rows is not None and each is not None:
        missing = (round(rows * each[0]), round(rows * each[1]))
    rate = scoring_rate(known)
    seconds = None if missing is None or rate is None else missing[0] / rate.tokens_per_second
    size = None if missing is None or rows is None else _bytes(known, policy, rows, *missing)
    writes = None if rows is None else write_requests(rows, shard_rows=run.shard_rows)
    one_row = None if each is None else _bytes(known, policy, 1, *each)
    return SoftLabelOption(
        policy=policy.model_dump(mode="json"),
        chosen=policy == known.basis.recipe.soft_labels,
        rows=cached.rows,
        rows_cached=cached.cached,
        tokens=None if missing is None else missing[1],
        bytes_a_token=None if one_row is None or each is None else one_row / each[1],
        bytes=None if size is None else round(size),
        write_requests=writes,
        epoch_requests=None if cached.rows is None else epoch_requests(cached.rows, shard_rows=run.shard_rows),
        seconds=seconds,
        price=price((run.price_per_hour, seconds, 3600), (run.price_per_thousand_requests, writes, 1000)),
        price_a_month=price((run.price_per_gb_month, size, 1e9)),
    )


def _bytes(known: Known, policy: SoftLabels, rows: int, tokens: float, positions: float) -> float | None:
    """Bytes by the codec's law and the shards' frame, times what a table of the same kind has measured against them."""
    groups = row_groups(rows, shard_rows=known.basis.recipe.run.shard_rows)
    a_position = soft_label_bytes(policy, num_columns=known.sizes.num_columns)
    if a_position is None:
        return None
    return bytes_factor(known, policy.kind) * (positions * a_position + table_bytes(rows, tokens, groups=groups))


def bytes_factor(known: Known, kind: str) -> float:
    """Measured bytes of stored soft labels of a kind over what the law says of them; 1.0 where nothing is measured."""
    stored = known.cached.stored_labels(kind)
    a_position = None if stored is None else soft_label_bytes(stored.policy, num_columns=stored.num_columns)
    if stored is None or a_position is None:
        return 1.0
    return stored.bytes / (stored.positions * a_position + table_bytes(stored.rows, stored.tokens, groups=stored.groups))


def scoring_rate(known: Known) -> ScoringRate | None:
    """Scoring rate: stated by the recipe, else measured with this teacher (with this kind of policy, if any was), else from arithmetic."""
    run, policy, parameters = known.basis.recipe.run, known.basis.recipe.soft_labels, known.sizes.teacher_parameters
    if run.score_tokens_per_second is not None:
        return ScoringRate(run.score_tokens_per_second, "recipe")
    records = [record for record in known.basis.finished("soft_labels") if known.sizes.same_teacher(record)]
    alike = [record for record in records if policy is not None and record.identity["kind"] == policy.kind]
    measured = measured_seconds(alike, known.cached.scored) or measured_seconds(records, known.cached.scored)
    if measured is not None:
        return ScoringRate(1.0 / measured, "measured")
    if parameters is None:
        return None
    return ScoringRate(1.0 / forward_seconds(parameters, tokens=1, passes=1 / run.micro_batch_tokens, run=run), "arithmetic")
