"""What a model's sampled answers are graded as."""

from collections import Counter

import pyarrow as pa

from kd_core.curate import judge
from kd_core.evaluate.measure import measure
from kd_core.progress import silent
from kd_core.prompts import PROMPT_SCHEMA
from kd_core.recipe import Answers, Run, Task

TASK = Task(template="plain", verifier="math")


def test_undecided_samples_are_counted_apart_and_are_not_right(tiny_model) -> None:
    rows = [
        {"prompt_id": str(i), "prompt": f"{i}+1=", "gold": None, "reference": str(i % 10), "split": "test", "source": "s"}
        for i in range(60)
    ]
    found = measure(
        tiny_model(),
        {"suite": pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)},
        seed=0,
        answers=Answers(num_samples=1, temperature=1.0, max_tokens=4),
        task=TASK,
        run=Run(),
        teacher=None,
        tick=silent,
    )
    scores = found.scores.to_pylist()
    verdicts = [judge(score["text"], row["reference"], TASK) for score, row in zip(scores, rows, strict=True)]
    counts = Counter(verdicts)
    assert counts["undecided"] > 0
    assert counts["wrong"] > 0
    assert found.undecided_samples == counts["undecided"]
    assert [score["pass_at_1"] for score in scores] == [float(verdict == "right") for verdict in verdicts]
