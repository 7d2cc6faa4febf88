"""One rank of a data-parallel run, or a run alone: ``python ranks_program.py OUT STORE STEPS``; ranks come from the environment."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_core.progress import silent
from kd_core.recipe import Objective, Run, Training
from kd_core.softlabels.targets import Common, DenseTargets
from kd_core.store import LocalStore
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.data import MemoryRows, TokenRow, TrainingData
from kd_core.train.loop import train

NUM_COLUMNS = 17


def targets(row: TokenRow, number: int) -> DenseTargets:
    logprobs_NV = torch.randn(row.num_supervised, NUM_COLUMNS, generator=torch.Generator().manual_seed(number)).log_softmax(-1)
    zeros_N = torch.zeros(row.num_supervised)
    return DenseTargets(Common(zeros_N, zeros_N, NUM_COLUMNS), logprobs_NV)


def main(out: Path, store: Path, stop_after: int) -> None:
    torch.manual_seed(5)
    draw = torch.Generator().manual_seed(0)
    rows = [TokenRow(tuple(torch.randint(2, 17, (4 + i % 9,), generator=draw).tolist()), 1 + i % 3) for i in range(24)]
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.5, pad_token_id=0, bos_token_id=None))
    training = Training(steps=8, batch_rows=5, learning_rate=0.01, warmup_steps=2, validate_every_steps=4, ema_decay=0.9)
    checkpoints = Checkpoints(LocalStore(store), "f" * 32)
    result = train(
        model,
        TrainingData(MemoryRows(rows, lambda i: targets(rows[i], i)), rows[:5]),
        num_columns=NUM_COLUMNS,
        training=training,
        objective=Objective(supervision="soft", hard_weight=0.4, soft_weight=0.6, temperature=2.0),
        seed=3,
        run=Run(device="cpu", micro_batch_tokens=64, checkpoint_every_steps=stop_after),
        checkpoints=checkpoints,
        tick=silent,
    )
    torch.save({"result": json.dumps(dataclasses.asdict(result)), "model": model.state_dict()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
