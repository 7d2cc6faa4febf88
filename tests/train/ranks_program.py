"""One rank of some runs: ``python ranks_program.py FOLDER RUNS``; who it is comes from the environment.

RUNS is JSON, name -> changes: ``tied`` (input and output embeddings), ``adapter``, ``features`` from a live teacher, groups of fields
``training`` and ``run``, a ``store`` that is not its own, and the step it ``breaks_at``.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import LlamaConfig, LlamaForCausalLM

from kd_core.progress import Tick
from kd_core.recipe import Adapter, BlockPair, CharacterTokenizer, Features, Objective, Run, Training
from kd_core.softlabels.targets import Common, TopKTargets
from kd_core.store import LocalStore
from kd_core.student.adapters import add_adapters
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import character_tokenizer
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.features import FeatureTask, LiveTeacher
from kd_core.train.loop import train
from kd_core.train.row_order import MemoryRows, TrainingData

NUM_COLUMNS = 17
KEPT = 4


def targets(row: TokenRow, number: int) -> TopKTargets:
    logprobs_NV = torch.randn(row.num_supervised, NUM_COLUMNS, generator=torch.Generator().manual_seed(number)).log_softmax(-1)
    logprobs_NK, ids_NK = logprobs_NV.topk(KEPT)
    normalizer_N1 = (logprobs_NV / 2.0).logsumexp(-1, keepdim=True)
    tail_N1 = (1.0 - (logprobs_NK / 2.0 - normalizer_N1).exp().sum(-1, keepdim=True)).log()
    zeros_N = torch.zeros(row.num_supervised)
    return TopKTargets(Common(zeros_N, zeros_N, NUM_COLUMNS), (2.0,), ids_NK, logprobs_NK, normalizer_N1, tail_N1)


class BrokenError(Exception):
    """A run that is asked to end early."""


def live_features(given: dict[str, Any]) -> FeatureTask:
    """A wider, deeper teacher beside the student."""
    sizes = {"vocab_size": 21, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(6)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.5, pad_token_id=0, bos_token_id=None))
    tokenizer = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="0123456789+-=,#"))
    features: Features = TypeAdapter(Features).validate_python(given)
    pairs = (BlockPair(student=0, teacher=1), BlockPair(student=1, teacher=2))
    teacher = LoadedModel(model.eval().requires_grad_(False), tokenizer, NUM_COLUMNS)
    return FeatureTask(features, pairs, LiveTeacher(teacher, features, pairs))


def train_one(store: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Result and weights of a run; of one that ``breaks_at`` a step, nothing."""
    torch.manual_seed(5)
    draw = torch.Generator().manual_seed(0)
    rows = [TokenRow(tuple(torch.randint(2, 17, (4 + 5 * (i % 9),), generator=draw).tolist()), 1 + i % 3) for i in range(24)]
    sizes = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    others = {"num_key_value_heads": 1, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **others, tie_word_embeddings=changes.get("tied", False)))
    if changes.get("adapter"):
        model.requires_grad_(False)
        add_adapters(model, Adapter(kind="lora", rank=2, alpha=4), seed=0)
    training = {"steps": 8, "batch_rows": 5, "learning_rate": 0.01, "warmup_steps": 2, "validate_every_steps": 4, "ema_decay": 0.9}

    task = live_features(changes["features"]) if "features" in changes else None
    features = None if task is None else task.features

    def tick(tick: Tick) -> None:
        if tick.done == changes.get("breaks_at"):
            raise BrokenError

    try:
        result = train(
            model,
            TrainingData(MemoryRows(rows, lambda i: targets(rows[i], i)), rows[:5]),
            num_columns=NUM_COLUMNS,
            training=Training.model_validate(training | changes.get("training", {})),
            objective=Objective(supervision="soft", hard_weight=0.4, soft_weight=0.6, temperature=2.0, features=features),
            seed=3,
            run=Run.model_validate({"device": "cpu", "micro_batch_tokens": 64, "checkpoint_every_steps": 3} | changes.get("run", {})),
            checkpoints=Checkpoints(LocalStore(store), "f" * 32),
            tick=tick,
            features=task,
        )
    except BrokenError:
        return {}
    return {**dataclasses.asdict(result), "model": {name: value.clone() for name, value in model.state_dict().items()}}


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for name, changes in json.loads(sys.argv[2]).items():
        torch.save(train_one(folder / changes.get("store", name), changes), folder / f"{name}.{rank}.pt")
