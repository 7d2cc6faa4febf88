"""Adapters through the training loop: only they learn, and a resumed run is the unbroken one."""

import pytest
import torch

from kd_core.progress import silent
from kd_core.recipe import Adapter, Objective, Run, Training
from kd_core.store import LocalStore
from kd_core.student.adapters import add_adapters, merge_adapters
from kd_core.student.make import student_from_blocks
from kd_core.tokens.batches import TokenRow
from kd_core.train import loop
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.row_order import MemoryRows, TrainingData

ROWS = [TokenRow(tuple(2 + (i * j) % 13 for j in range(1, 9)), 3) for i in range(1, 30)]


def test_a_resumed_run_gives_the_merged_weights_of_an_unbroken_one(tiny_model, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> tuple[dict[str, torch.Tensor], int]:
        model = add_adapters(student_from_blocks(tiny_model(), 1), Adapter(kind="dora", rank=2, alpha=4.0, dropout=0.1), seed=0)
        result = loop.train(
            model,
            TrainingData(MemoryRows(ROWS), ROWS[:4]),
            num_columns=17,
            training=Training(steps=8, batch_rows=4, learning_rate=0.01, ema_decay=0.9),
            objective=Objective(supervision="hard"),
            seed=0,
            run=Run(checkpoint_every_steps=3, device="cpu"),
            checkpoints=Checkpoints(LocalStore(tmp_path / name), "a" * 32, 2),
            tick=silent,
        )
        return merge_adapters(model).state_dict(), result.resumed_from

    def die_in_step_five(_: str) -> None:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    whole, _ = run("whole")
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "reach", die_in_step_five)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    again, resumed_from = run("broken")
    assert resumed_from == 3
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    before = student_from_blocks(tiny_model(), 1).state_dict()
    moved = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert moved == {name for name in whole if "_proj." in name}
