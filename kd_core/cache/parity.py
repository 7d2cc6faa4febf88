"""Check that the teacher that made the soft labels is the one that runs here: a few stored rows are scored again and compared.

Catches what no checksum sees: labels made in train mode, with an adapter on, quantised, from another template or revision
(trap 20 of those that distillation falls into). The bounds are what the codec and rounding of the teacher's dtype may do.
"""

import random
from dataclasses import dataclass

import pyarrow as pa
import torch

from kd_core.cache.catalog import read_shard
from kd_core.cache.explode import decode_rows_of, entries
from kd_core.errors import ArtifactError, RecipeError
from kd_core.progress import Tick, Ticker, silent
from kd_core.recipe import Recipe
from kd_core.rows.keys import soft_label_namespace
from kd_core.rows.table import RowCache
from kd_core.softlabels.capture import score_rows
from kd_core.softlabels.targets import Targets
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.job import Job
from kd_core.store import Store
from kd_core.store.scratch import scratch
from kd_core.task_kinds.generation import load_text_teacher
from kd_core.tokens.batches import TokenRow

__all__ = ["Bounds", "Parity", "RowParity", "compare", "live_parity"]


@dataclass(frozen=True)
class Bounds:
    """Bounds on what the codec and rounding may do: see RowParity for the three."""

    gold_error: float
    total_variation: float
    same_ids: float


_BOUNDS = {torch.float32: Bounds(0.02, 0.02, 0.8)}
_BOUNDS_16_BIT = Bounds(0.2, 0.2, 0.0)
"""Bounds by dtype. The codec alone: 0.016, sqrt(1e-4 / 2) = 0.007, and it keeps ids as they are. float32 on one machine adds 1e-5 to a
log-probability, TensorFloat-32 1e-3, which moves few draws and swaps few ids at the k-th place; bfloat16 in another batch moves a
log-probability by up to 0.1, a probability by up to 0.07, and ids at will."""


@dataclass(frozen=True)
class RowParity:
    """Comparison of one row, stored against live.

    Attributes:
        key: of the row.
        tokens: supervised ones.
        gold_error: largest of |stored - live| / (1 + |live|) over the gold log-probabilities.
        total_variation: half the absolute difference over all ids, mean over tokens; of sampled labels between the two draws.
        same_ids: share of tokens at which both keep the very same ids (and, of sampled labels, as many draws on each).
        holds: whether all three are within the bounds.
    """

    key: str
    tokens: int
    gold_error: float
    total_variation: float
    same_ids: float
    holds: bool


@dataclass(frozen=True)
class Parity:
    """The comparison: rows sorted by key, rows that the live teacher refuses (key -> reason), and the bounds."""

    namespace: str
    rows: tuple[RowParity, ...]
    refused: dict[str, str]
    bounds: Bounds

    @property
    def holds(self) -> bool:
        """Whether every row is within the bounds."""
        return not self.refused and all(row.holds for row in self.rows)


def compare(stored: Targets, live: Targets) -> tuple[float, float, float]:
    """(gold error, total variation, share of tokens with the same ids) of targets at the same positions; see RowParity."""
    gold_N, live_gold_N = stored.common.gold_logprob_N, live.common.gold_logprob_N
    gold_error = float(((gold_N - live_gold_N).abs() / (1 + live_gold_N.abs())).max())
    num, num_columns = len(gold_N), live.common.num_columns
    a, b = entries(stored), entries(live)
    at_E = torch.cat([a.position_E * num_columns + a.id_E, b.position_E * num_columns + b.id_E])
    places, index_E = torch.unique(at_E, return_inverse=True)
    difference_P = torch.zeros(len(places)).index_add(0, index_E, torch.cat([a.probability_E, -b.probability_E]))
    count_P = torch.bincount(index_E, minlength=len(places))
    differs_P = (count_P == 1) if a.logprob_E is not None else (difference_P.abs() > 1e-6)
    differing = len(torch.unique(torch.div(places[differs_P], num_columns, rounding_mode="floor")))
    return gold_error, float(difference_P.abs().sum()) / 2 / num, 1 - differing / num


def live_parity(recipe: Recipe, store: Store, *, num_rows: int, tick: Ticker = silent) -> Parity:
    """Score rows of the recipe's soft labels again with its teacher.

    Args:
        recipe: whose teacher and policy.
        store: where its teacher's record and its soft labels are.
        num_rows: rows, drawn anew each time.
        tick: progress, in rows.

    Raises:
        RecipeError: the recipe has no soft labels.
        ArtifactError: the teacher, or any soft label of it, is not in this store.
        TeacherError: the teacher cannot be loaded here.
    """
    policy = recipe.soft_labels
    if policy is None:
        raise RecipeError("soft_labels: null, so there is nothing to compare with the teacher")
    node = build_graph(recipe, store)["teacher"]
    record = open_node(store, node)
    cache = RowCache(store, "soft_labels", soft_label_namespace(policy, record))
    snapshot = cache.snapshot()
    if not snapshot.lines:
        raise ArtifactError(f"{store.uri}/{cache.prefix}: no soft labels of this teacher and policy; run the recipe first")
    keys = sorted(random.sample(sorted(snapshot.lines), min(num_rows, len(snapshot.lines))))
    tick(Tick(0, len(keys), "rows"))
    rows = {
        key: read_shard(cache, place.commit).take(pa.array([place.row]))
        for key, place in zip(keys, map(snapshot.place, cache.lines(snapshot, keys)), strict=True)
    }
    wanted = [(key, TokenRow(tuple(row["ids"][0].as_py()), row["first_supervised"][0].as_py())) for key, row in rows.items()]
    with scratch() as directory:
        teacher = load_text_teacher(Job(recipe, node, store, {"teacher": record}, directory, silent))
    live = score_rows(teacher, wanted, policy=policy, micro_batch_tokens=recipe.run.micro_batch_tokens)
    tick(Tick(len(keys), len(keys), "rows"))
    bounds = _BOUNDS.get(teacher.model.dtype, _BOUNDS_16_BIT)
    found = tuple(_row(scored.key, decode_rows_of(rows[scored.key]), scored.targets, bounds) for scored in live.scored)
    return Parity(cache.namespace, found, live.refused, bounds)


def _row(key: str, stored: Targets, live: Targets, bounds: Bounds) -> RowParity:
    gold, variation, same = compare(stored, live)
    holds = gold <= bounds.gold_error and variation <= bounds.total_variation and same >= bounds.same_ids
    return RowParity(key, len(live.common.gold_logprob_N), gold, variation, same, holds)
