"""What ranks read together is what one reads alone, in as many passes each; a layout loses nothing."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_core.errors import SoftLabelError, TrainingError
from kd_core.recipe import Training
from kd_core.tokens.batches import TokenRow
from kd_core.train.batches import Feed, TokenLayout
from kd_core.train.row_order import MemoryRows

CPU = torch.device("cpu")


def rows_of(lengths: list[int]) -> list[TokenRow]:
    return [TokenRow(tuple(range(length)), 1 + i % (length - 1)) for i, length in enumerate(lengths)]


@given(
    lengths=st.lists(st.integers(2, 30), min_size=4, max_size=20),
    batch_rows=st.integers(3, 12),
    num_ranks=st.integers(1, 3),
    budget=st.integers(1, 60),
    packed=st.booleans(),
)
def test_ranks_share_the_rows_of_a_step(lengths: list[int], batch_rows: int, num_ranks: int, budget: int, packed: bool) -> None:
    rows, layout = rows_of(lengths), TokenLayout(packed, budget, CPU)
    training = Training(steps=9, batch_rows=batch_rows, learning_rate=0.1)
    alone = Feed(MemoryRows(rows), training, layout, seed=3)
    ranks = [Feed(MemoryRows(rows), training, layout, seed=3, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for step in (0, 4):
        one, plans = alone.plan(step, soft=False), [feed.plan(step, soft=False) for feed in ranks]
        everything = Counter(i for plan in plans for batch in plan.batches for i in batch)
        assert everything == Counter(i for batch in one.batches for i in batch)
        assert (
            {plan.num_supervised for plan in plans}
            == {one.num_supervised}
            == {sum(rows[i].num_supervised * n for i, n in everything.items())}
        )
        assert len({plan.num_passes for plan in plans}) == 1
        counted = 0.0
        for feed, plan in zip(ranks, plans, strict=True):
            batches = [feed.read(plan, number, soft=False) for number in range(plan.num_passes)]
            assert all(batch.num_tokens <= budget or batch.inputs["input_ids"].shape[0] * packed <= 1 for batch in batches)
            counted += sum(batch.share * len(batch.labels_N) for batch in batches)
        assert counted == one.num_supervised


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_predicts_its_labels(packed: bool) -> None:
    rows = [TokenRow((5, 6, 7, 8), 2), TokenRow((9, 4), 1)]
    batch = TokenLayout(packed, 100, CPU).batch(rows)
    assert batch.labels_N.tolist() == [7, 8, 4]
    assert batch.inputs["input_ids"][batch.predict_at].tolist() == [6, 7, 9]
    assert batch.num_tokens == (6 if packed else 8)
    assert batch.inputs["use_cache"] is False


def test_nothing_is_fetched_for_steps_that_never_come() -> None:
    asked = list[tuple[int, ...]]()

    class Asked(MemoryRows):
        def prefetch(self, numbers: Sequence[int], *, soft: bool) -> None:
            asked.append(tuple(numbers))

    feed = Feed(Asked(rows_of([4] * 40)), Training(steps=6, batch_rows=5, learning_rate=0.1), TokenLayout(True, 64, CPU), seed=0)
    plans = [feed.plan(step, soft=True) for step in range(6)]
    assert asked == [batch for plan in plans[4:] for batch in plan.batches]


@pytest.mark.parametrize(("num_rows", "told"), [(12, True), (8, False)], ids=["two buffers", "one buffer"])
def test_rows_of_half_a_buffer_later_are_told(monkeypatch: pytest.MonkeyPatch, num_rows: int, told: bool) -> None:
    monkeypatch.setattr("kd_core.train.batches.EXPECTED_ROWS", 4)
    monkeypatch.setattr("kd_core.train.batches.PREFETCH_STEPS", 1)
    expected = list[list[int]]()

    class Told(MemoryRows):
        def expect(self, numbers: Sequence[int]) -> None:
            expected.append(list(numbers))

    training = Training(steps=6, batch_rows=2, learning_rate=0.1)
    feed = Feed(Told(rows_of([4] * num_rows)), training, TokenLayout(True, 64, CPU), seed=0)
    plans = [feed.plan(step, soft=True) for step in range(6)]
    later = [sorted(row for batch in plan.batches for row in batch) for plan in plans[2:]]
    assert [sorted(numbers) for numbers in expected] == (later if told else [])


def test_what_cannot_be_dealt_is_refused() -> None:
    layout, rows = TokenLayout(True, 64, CPU), MemoryRows(rows_of([4, 5, 6]))
    with pytest.raises(TrainingError, match="2 rows for 3 ranks; start at most that many ranks"):
        Feed(rows, Training(steps=1, batch_rows=2, learning_rate=0.1), layout, seed=0, num_ranks=3)
    feed = Feed(rows, Training(steps=1, batch_rows=3, learning_rate=0.1, max_tokens=8), layout, seed=0)
    with pytest.raises(SoftLabelError, match="have no soft labels"):
        feed.read(feed.plan(0, soft=False), 0, soft=True)
