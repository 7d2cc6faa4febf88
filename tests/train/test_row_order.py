"""The order of rows is a function of (seed, step), covers every epoch once, and batches lose nothing."""

import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.tokens.batches import TokenRow, token_batches
from kd_core.train.row_order import BLOCK_ROWS, BUFFER_BLOCKS, step_rows


@given(num=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_holds_each_row_once(num: int, batch: int, seed: int) -> None:
    steps = -(-3 * num // batch)
    stream = [i for step in range(steps) for i in step_rows(num, batch, seed=seed, step=step)]
    assert len(stream) == steps * batch
    for start in range(0, 3 * num, num):
        assert sorted(stream[start : start + num]) == list(range(num))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(step_rows(50, 50, seed=seed, step=step)) for seed in (0, 1, 2**32 - 1) for step in range(4)]
    assert len(set(orders)) == len(orders)


def test_a_step_needs_no_step_before_it() -> None:
    """Resume by position: step 7 alone is step 7 of the unbroken run, in this process and in another."""
    wanted = step_rows(13, 5, seed=3, step=7)
    code = "from kd_core.train.row_order import step_rows; print(step_rows(13, 5, seed=3, step=7))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted)
    assert [step_rows(13, 5, seed=3, step=s) for s in range(9)][7] == wanted


@given(st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = [TokenRow(tuple(range(length)), 1) for length in lengths]
    batches = list(token_batches(rows, budget))
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize(("ids", "first", "expected"), [((1, 2, 3), 1, 2), ((1, 2, 3), 2, 1)])
def test_supervised_tokens_are_counted(ids: tuple[int, ...], first: int, expected: int) -> None:
    assert TokenRow(ids, first).num_supervised == expected


@pytest.mark.parametrize("num", [64 * 64 + 1, 3 * 64 * 64 + 17, 9_999])
def test_many_rows_are_shuffled_in_buffers_of_blocks(num: int) -> None:
    """Each row once an epoch, few blocks at a time, and no trace of the stored order."""
    stream = step_rows(num, num, seed=5, step=0)
    assert sorted(stream) == list(range(num))
    for start in range(0, num - BLOCK_ROWS * BUFFER_BLOCKS, BLOCK_ROWS * BUFFER_BLOCKS):
        window = stream[start : start + BLOCK_ROWS * BUFFER_BLOCKS]
        assert len({i // BLOCK_ROWS for i in window}) <= 2 * BUFFER_BLOCKS
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(stream))
    assert neighbours < 0.01 * num
    assert stream != step_rows(num, num, seed=5, step=1) != step_rows(num, num, seed=6, step=0)


def test_a_batch_across_buffers_and_epochs_is_the_stream_cut_in_pieces() -> None:
    num = 2 * 64 * 64 + 5
    pieces = [i for step in range(40) for i in step_rows(num, 411, seed=1, step=step)]
    whole = [i for step in range(2) for i in step_rows(num, num, seed=1, step=step)]
    assert pieces[: 2 * num] == whole[: len(pieces)]
