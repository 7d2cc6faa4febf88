"""Models are compared class by class: by names, whatever the order of their columns."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from kd_core.errors import SourceError
from kd_core.evaluate.measure_classes import measure_classes
from kd_core.progress import silent

LOGITS = {b"0": {"a": 2.0, "b": 0.0, "c": -1.0}, b"1": {"a": 0.0, "b": 1.0, "c": 0.5}, b"2": {"a": -1.0, "b": 0.0, "c": 3.0}}


def model(*classes: str, shift: float = 0.0) -> Any:
    """A stand-in for a classifier with these columns; with a shift it likes 'b' more than the teacher does."""

    def logits(hashes: list[bytes]) -> torch.Tensor:
        return torch.tensor([[LOGITS[sha256][name] + shift * (name == "b") for name in classes] for sha256 in hashes])

    return SimpleNamespace(classes=classes, logits=logits, reader=SimpleNamespace(batch=lambda hashes: None, cut=set()))


def scores(measured: Any, teacher: Any, golds: str = "abc", unseen: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    items = [{"prompt_id": str(i), "prompt": str(i), "gold": gold, "source": "here"} for i, gold in enumerate(golds)]
    suites = {"test": pa.Table.from_pylist(items)}
    found = measure_classes(measured, suites, teacher=teacher, hash_of=str.encode, unseen=unseen, seed=0, tick=silent)
    rows: list[dict[str, Any]] = found.scores.to_pylist()
    return rows


def test_another_order_of_columns_is_the_same_model() -> None:
    teacher = model("a", "b", "c")
    one, other = scores(model("a", "b", "c", shift=0.7), teacher), scores(model("c", "a", "b", shift=0.7), teacher)
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right)
        assert left["kl_sum"] > 0.01
    assert all(row["kl_sum"] == pytest.approx(0.0, abs=1e-6) for row in scores(model("b", "c", "a"), teacher))


def test_a_model_without_a_class_gets_its_items_wrong_and_has_no_loss_there() -> None:
    rows = scores(model("a", "b"), model("a", "b", "c"))
    assert [row["accuracy"] for row in rows] == [1.0, 1.0, 0.0]
    assert [row["nll_sum"] is None for row in rows] == [False, False, True]
    assert all(row["kl_sum"] is None for row in rows)
    assert [row["agreement_sum"] for row in rows] == [1.0, 1.0, 0.0]


def test_recall_of_the_unseen_is_about_their_items_alone() -> None:
    rows = scores(model("a", "b", "c"), None, unseen=("c",))
    assert [row["unseen_recall"] for row in rows] == [None, None, 1.0]


def test_a_class_that_the_teacher_does_not_know_is_refused() -> None:
    with pytest.raises(SourceError, match="has the class 'd', which the teacher does not know"):
        scores(model("a", "b", "c"), model("a", "b", "c"), golds="abd")
