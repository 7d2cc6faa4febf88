"""TRL's GKD trainer on token rows: its own loop, its own loss, its live teacher. lambda 0: no answers of the student; beta 0: forward KL.

KD_PEER_TRL names a directory that holds the package trl (1.16).
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback

from benchmarks.peers.losses import importable
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow

__all__ = ["GkdSteps", "gkd_steps", "why_not_gkd"]


@dataclass(frozen=True)
class GkdSteps:
    """What its steps took.

    Attributes:
        first_loss: forward KL of the first step, nats a supervised token.
        seconds: (process, wall) of a step, after the first one.
    """

    first_loss: float
    seconds: tuple[float, float]


def why_not_gkd() -> str | None:
    """Why it cannot be run; None if it can."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return importable("KD_PEER_TRL", "a directory with the package trl 1.16", "trl.experimental.gkd")


class _Marks(TrainerCallback):
    """Clocks after every step."""

    def __init__(self) -> None:
        self.clocks: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clocks.append((time.process_time(), time.perf_counter()))


def gkd_steps(teacher: LoadedModel, student: LoadedModel, rows: Sequence[TokenRow], steps: int) -> GkdSteps:
    """Train ``student`` in place for at least two steps, all rows in each; call only where ``why_not_gkd`` is None."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    marks = _Marks()
    with tempfile.TemporaryDirectory() as scratch:
        config = GKDConfig(
            output_dir=scratch,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=len(rows),
            max_steps=steps,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = Dataset.from_list([{"ids": list(row.ids), "first": row.first_supervised} for row in rows])
        trainer = GKDTrainer(
            model=student.model,
            teacher_model=teacher.model,
            args=config,
            data_collator=_padded,
            train_dataset=dataset,
            processing_class=student.tokenizer,
            callbacks=[marks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    process, wall = ((last - first) / (steps - 1) for first, last in zip(marks.clocks[0], marks.clocks[-1], strict=True))
    return GkdSteps(trainer.state.log_history[0]["loss"], (process, wall))


def _padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as its own collator gives them: labels of prompts and padding are -100."""
    ids = [torch.tensor(row["ids"]) for row in rows]
    labels = [torch.where(torch.arange(len(i)) >= row["first"], i, -100) for i, row in zip(ids, rows, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
