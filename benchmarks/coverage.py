"""Whether 95% intervals hold the truth in 95% of cases: ``python -m benchmarks.coverage [--json] [--quick]``.

Each row simulates 10,000 score tables whose truth is known (1,000 with --quick) and counts. The arrays of all tables go
through ``kd_core.evaluate.intervals``, which ``estimate`` and ``compare`` call; of ten tables of each block both are
called too, and the gate, and must give the same.

An answer to item i of the student of seed s is right with probability d_i + e_s, cut to [0, 1]: d_i uniform in 0.2 to 0.8,
e_s normal, so that a share's mean over all items and seeds is 0.5. Axes: N tables, I items, S seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from benchmarks.measure import Check, Figure, at_least, at_most, figure, show, tell
from kd_core.evaluate.gate import Evidence, decide
from kd_core.evaluate.intervals import Array, difference_interval, linearised, mean_interval, share_interval
from kd_core.evaluate.statistics import SCORE_SCHEMA, Comparison, Estimate, compare, estimate
from kd_core.recipe import BetterThan, Gate

__all__ = ["Row", "run"]

CONFIDENCE = 0.95
_NUM_TABLES, _NUM_QUICK = 10_000, 1_000
_NUM_CHECKED = 10
_ELEMENTS_AT_ONCE = 4_000_000
_LEAST, _MOST = 93.0, 98.5
_MOST_FALSE = 3.0
_GATE = Gate(rules=(BetterThan(kind="better_than", metric="pass_at_1", than="baseline"),))


@dataclass(frozen=True)
class Row:
    """One setting: training seeds, standard deviation of their effect, items, samples an item."""

    num_seeds: int
    seed_sd: float
    num_items: int
    num_samples: int = 1

    @property
    def name(self) -> str:
        """'3 seeds, sd 0.08, 200 items'."""
        samples = f" of {self.num_samples} samples" if self.num_samples > 1 else ""
        return f"{self.num_seeds} {'seed' if self.num_seeds == 1 else 'seeds'}, sd {self.seed_sd:g}, {self.num_items} items{samples}"


_SHARES = (
    *(Row(1, 0.0, 30), Row(1, 0.0, 500), Row(1, 0.0, 30, 64), Row(1, 0.0, 500, 64)),
    *(Row(3, 0.02, 500), Row(3, 0.08, 200), Row(3, 0.15, 500), Row(5, 0.15, 500)),
)
_LOSSES = (Row(1, 0.0, 200), Row(3, 0.1, 200))
_EQUAL = (Row(3, 0.08, 400), Row(3, 0.15, 400), Row(2, 0.15, 400), Row(5, 0.15, 400))
_ONE_SEED = (Row(1, 0.02, 400), Row(1, 0.08, 400), Row(1, 0.15, 400))


def run(*, quick: bool) -> list[Figure]:
    """All figures, each told on standard error as soon as it is there."""
    num_tables = _NUM_QUICK if quick else _NUM_TABLES
    figures = [found for row in _SHARES for found in tell([_share(row, num_tables)])]
    figures += [found for row in _LOSSES for found in tell([_loss(row, num_tables)])]
    figures += [found for row in _EQUAL for found in tell(_equal_recipes(row, num_tables))]
    return figures + [found for row in _ONE_SEED for found in tell([_one_seed(row, num_tables)])]


# ---------------------------------------------------------------------------------------------- what is simulated


def _blocks(row: Row, num_tables: int) -> Iterator[tuple[np.random.Generator, int]]:
    """(generator, tables) of blocks that fit in memory; the numbers depend on the row alone."""
    rng = np.random.default_rng([row.num_seeds, round(1000 * row.seed_sd), row.num_items, row.num_samples])
    size = max(1, _ELEMENTS_AT_ONCE // (row.num_items * row.num_seeds))
    for start in range(0, num_tables, size):
        yield rng, min(size, num_tables - start)


def _difficulties(rng: np.random.Generator, row: Row, num_tables: int) -> Array:
    return rng.uniform(0.2, 0.8, size=(num_tables, row.num_items, 1))


def _shares_right(rng: np.random.Generator, row: Row, d_NI1: Array) -> Array:
    """Shares of right answers, (N, I, S), of one recipe on items of these difficulties."""
    effect_N1S = rng.normal(0.0, row.seed_sd, size=(len(d_NI1), 1, row.num_seeds))
    p_NIS = np.clip(d_NI1 + effect_N1S, 0.0, 1.0)
    right: Array = rng.binomial(row.num_samples, p_NIS) / row.num_samples
    return right


def _losses(rng: np.random.Generator, row: Row, num_tables: int) -> tuple[Array, Array]:
    """(sums, tokens), (N, I, S): a token's mean loss is 1, less in longer answers; items and seeds differ."""
    tokens = rng.integers(20, 200, size=(num_tables, row.num_items, 1)) * np.ones((1, 1, row.num_seeds))
    of_item = rng.gamma(4.0, 0.25, size=(num_tables, row.num_items, 1)) * (1.3 - 0.3 * tokens / _MEAN_TOKENS_BY_TOKEN)
    of_seed = rng.normal(0.0, row.seed_sd, size=(num_tables, 1, row.num_seeds))
    rest = rng.normal(0.0, 0.1, size=tokens.shape)
    return tokens * (of_item + of_seed + rest), tokens


_MEAN_TOKENS_BY_TOKEN = sum(n * n for n in range(20, 200)) / sum(range(20, 200))
"""Length of the answer that a token stands in, on average over tokens: it makes the loss a token 1."""


# ---------------------------------------------------------------------------------------------- figures


def _share(row: Row, num_tables: int) -> Figure:
    lows, highs, same = [], [], True
    for rng, size in _blocks(row, num_tables):
        x_NIS = _shares_right(rng, row, _difficulties(rng, row, size))
        low, high = share_interval(x_NIS, CONFIDENCE)
        same &= all(_agree(_estimated(_table(pass_at_1=x_NIS[i]), "pass_at_1"), low[i], high[i]) for i in range(min(_NUM_CHECKED, size)))
        lows.append(low)
        highs.append(high)
    return _coverage(f"a share: {row.name}", np.concatenate(lows), np.concatenate(highs), 0.5, same)


def _loss(row: Row, num_tables: int) -> Figure:
    lows, highs, same = [], [], True
    for rng, size in _blocks(row, num_tables):
        sums, tokens = _losses(rng, row, size)
        low, high = mean_interval(linearised(sums, tokens), CONFIDENCE)
        same &= all(
            _agree(_estimated(_table(nll_sum=sums[i], tokens=tokens[i]), "nll"), low[i], high[i]) for i in range(min(_NUM_CHECKED, size))
        )
        lows.append(low)
        highs.append(high)
    return _coverage(f"a loss a token: {row.name}", np.concatenate(lows), np.concatenate(highs), 1.0, same)


def _equal_recipes(row: Row, num_tables: int) -> list[Figure]:
    low, high, same = _differences(row, num_tables, refused=False)
    name = f"two equal recipes: {row.name}"
    promoted = 100.0 * float((low > 0.0).mean())
    check = Check(f"{_told(num_tables, promoted)}; 2.5 meant; the gate says the same of {_NUM_CHECKED} tables a block: {same}", ok=same)
    return [
        _coverage(f"{name}, difference", low, high, 0.0, same),
        figure(f"{name}, promoted by better_than", promoted, "%", check, less_is_better=True, goal=at_most(_MOST_FALSE)),
    ]


def _one_seed(row: Row, num_tables: int) -> Figure:
    """One seed: how many the gate promotes, and how many it would without its refusal."""
    low, _, refused = _differences(row, num_tables, refused=True)
    would = 100.0 * float((low > 0.0).mean())
    text = f"the gate refuses {_NUM_CHECKED} tables a block: {refused}; without the refusal {would:.1f}% would be promoted"
    name = f"two equal recipes: {row.name}, promoted by better_than"
    return figure(name, 0.0 if refused else None, "%", Check(text, ok=refused), less_is_better=True, goal=at_most(_MOST_FALSE))


def _differences(row: Row, num_tables: int, *, refused: bool) -> tuple[Array, Array, bool]:
    """Ends of the difference of two equal recipes on the same items, and whether compare and the gate agree on some tables."""
    lows, highs, same = [], [], True
    for rng, size in _blocks(row, num_tables):
        d_NI1 = _difficulties(rng, row, size)
        a_NIS, b_NIS = _shares_right(rng, row, d_NI1), _shares_right(rng, row, d_NI1)
        low, high = difference_interval(a_NIS, b_NIS, CONFIDENCE, shares=True)
        for i in range(min(_NUM_CHECKED, size)):
            student, baseline = _table(pass_at_1=a_NIS[i]), _table(pass_at_1=b_NIS[i])
            pair = compare(student, baseline, "pass_at_1", suite="test", confidence=CONFIDENCE)
            evidence = Evidence({"student": student, "baseline": baseline}, {}, ("test",), CONFIDENCE, 0, None)
            verdict = decide(evidence, _GATE)
            wanted = False if refused else bool(low[i] > 0.0)
            same &= _agree(pair, low[i], high[i]) and verdict.promote == wanted
            same &= verdict.reasons[0].detail.startswith("refused") == refused
        lows.append(low)
        highs.append(high)
    return np.concatenate(lows), np.concatenate(highs), same


def _coverage(name: str, low: Array, high: Array, truth: float, same: bool) -> Figure:
    covered = 100.0 * float(((low <= truth) & (truth <= high)).mean())
    width = float((high - low).mean())
    text = f"{_told(len(low), covered)}; mean width {width:.3f}; at most {_MOST:g}%: {covered <= _MOST}; tables give the same: {same}"
    return figure(f"{name}, coverage", covered, "%", Check(text, ok=same and covered <= _MOST), goal=at_least(_LEAST))


def _told(num_tables: int, percent: float) -> str:
    return f"{num_tables:,} tables, standard error {(percent * (100.0 - percent) / num_tables) ** 0.5:.2f}"


def _estimated(scores: pa.Table, metric: str) -> Estimate | None:
    return estimate(scores, metric, suite="test", confidence=CONFIDENCE)


def _agree(found: Estimate | Comparison | None, low: float, high: float) -> bool:
    return found is not None and abs(found.low - low) < 1e-9 and abs(found.high - high) < 1e-9


def _table(**columns: Array) -> pa.Table:
    """A score table of columns [I, S]."""
    num_items, num_seeds = next(iter(columns.values())).shape
    data = {
        "suite": ["test"] * (num_items * num_seeds),
        "item_id": np.repeat([f"{i:05d}" for i in range(num_items)], num_seeds).tolist(),
        "seed": list(range(num_seeds)) * num_items,
        **{name: column.ravel() for name, column in columns.items()},
    }
    if "tokens" in data:
        data["tokens"] = columns["tokens"].ravel().astype(np.int64)
    empty = [None] * (num_items * num_seeds)
    return pa.table([pa.array(data.get(field.name, empty), field.type) for field in SCORE_SCHEMA], schema=SCORE_SCHEMA)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="1,000 tables a row; seconds.")] = False,
) -> None:
    """Count how often intervals hold the truth, and how often a gate is wrong."""
    show(run(quick=quick), as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
