"""Measuring one classifier on the suites: accuracy, loss of the gold class, distance to the teacher, recall of classes it never saw.

Axes: N items of a pass, V classes.

Models are compared class by class, by their names: a champion may have its columns in another order than today's teacher, or lack a class
that has come since. An item of such a class it gets wrong, and has no loss on; without the same classes there is no distance.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from kd_core.errors import SourceError
from kd_core.evaluate.measure import Measured
from kd_core.evaluate.statistics import SCORE_SCHEMA
from kd_core.progress import Tick, Ticker
from kd_core.teacher.classifiers import Classifier

__all__ = ["measure_classes"]

_ITEMS = 256
"""Items of a forward pass."""
_SHOWN_CLASSES = 5
"""Likeliest classes of an item that are kept for the report."""


def measure_classes(
    model: Classifier,
    suites: Mapping[str, pa.Table],
    *,
    teacher: Classifier | None,
    hash_of: Callable[[str], bytes],
    unseen: Collection[str],
    seed: int,
    tick: Ticker,
) -> Measured:
    """Measure one model on all suites.

    Args:
        model: the model.
        suites: name -> items (PROMPT_SCHEMA) whose gold answer is their class.
        teacher: whose distribution it is compared with; ``model`` itself for the teacher's own line; None leaves kl and agreement null.
        hash_of: prompt -> SHA-256 of its input.
        unseen: classes of which the student saw no row.
        seed: label of the training seed in the scores.
        tick: progress, in items.

    Raises:
        SourceError: an item is of a class that the teacher does not know.
    """
    scores: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    total, seconds = sum(table.num_rows for table in suites.values()), 0.0
    for suite, table in suites.items():
        for start in range(0, table.num_rows, _ITEMS):
            items = table.slice(start, _ITEMS).to_pylist()
            hashes = [hash_of(item["prompt"]) for item in items]
            model.reader.batch(hashes)  # read and prepared before the clock runs: that is no work of the model
            began = time.perf_counter()
            log_q_NV = _log_probabilities(model, hashes)
            seconds += time.perf_counter() - began
            log_p_NV = None if teacher is None else log_q_NV if teacher is model else _log_probabilities(teacher, hashes)
            compared = _Compared(model.classes, None if teacher is None else teacher.classes, log_q_NV, log_p_NV)
            for item, found, guess in zip(items, compared.scores(items, unseen), compared.guesses(), strict=True):
                where = {"suite": suite, "item_id": item["prompt_id"], "seed": seed}
                scores.append({**dict.fromkeys(SCORE_SCHEMA.names), **where, **found})
                guesses.append({**where, **guess})
            tick(Tick(len(scores), total, "items"))
    return Measured(
        scores=pa.Table.from_pylist(scores, schema=SCORE_SCHEMA),
        tokens_per_second=total / max(seconds, 1e-9),
        undecided_samples=0,
        items_beyond_positions=len(model.reader.cut),
        guesses=pa.Table.from_pylist(guesses),
    )


@torch.inference_mode()
def _log_probabilities(model: Classifier, hashes: Sequence[bytes]) -> Tensor:
    return model.logits(hashes).log_softmax(-1).cpu()


@dataclass(frozen=True)
class _Compared:
    """Log-probabilities of some items by a model and, where there is one, by the teacher: each with the names of its columns."""

    classes: tuple[str, ...]
    teacher_classes: tuple[str, ...] | None
    log_q_NV: Tensor
    log_p_NV: Tensor | None

    def scores(self, items: Sequence[Mapping[str, Any]], unseen: Collection[str]) -> Iterator[dict[str, Any]]:
        """Columns of SCORE_SCHEMA of each item."""
        same, index = self.teacher_classes is not None and set(self.teacher_classes) == set(self.classes), self.classes.index
        order = [self.teacher_classes.index(name) for name in self.classes] if same and self.teacher_classes is not None else []
        for i, item in enumerate(items):
            log_q_V, gold = self.log_q_NV[i], item["gold"]
            if gold not in (self.teacher_classes or self.classes):
                raise SourceError(
                    f"item {item['prompt_id']} of {item['source']} has the class {gold!r}, which the teacher does not know; correct it, or "
                    "train the teacher on such rows too"
                )
            guess = self.classes[int(log_q_V.argmax())]
            right = float(guess == gold)
            nll = -float(log_q_V[index(gold)]) if gold in self.classes else None
            found = {"accuracy": right, "unseen_recall": right if gold in unseen else None, "nll_sum": nll, "tokens": 1, "text": guess}
            if self.log_p_NV is not None and self.teacher_classes is not None:
                found["agreement_sum"] = float(guess == self.teacher_classes[int(self.log_p_NV[i].argmax())])
                log_p_V = self.log_p_NV[i][order]
                found["kl_sum"] = float((log_p_V.exp() * (log_p_V - log_q_V)).sum()) if same else None
            yield found

    def guesses(self) -> Iterator[dict[str, Any]]:
        """The likeliest classes of each item, with their probabilities."""
        for log_q_V in self.log_q_NV:
            top = log_q_V.topk(min(_SHOWN_CLASSES, len(log_q_V)))
            yield {"classes": [self.classes[i] for i in top.indices.tolist()], "probabilities": top.values.exp().tolist()}
