"""Numbers that a run has seen so far: they are logged, steer the run, and travel in its checkpoints.

Everything here but ``speed`` is a function of the recipe and the data, so a resumed run logs what the unbroken one logs.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from kd_core.artifacts import Record, read_bytes
from kd_core.store import Store

__all__ = ["History", "logged_metrics", "to_jsonl"]

_SPIKE_WINDOW = 50
_SPIKE_LEAST = 20
_SPIKE_DEVIATIONS = 8.0
_SPIKE_SHARE = 0.1


@dataclass
class History:
    """Numbers of a run.

    Attributes:
        metrics: one dict a logged step, as ``TrainingResult`` says.
        speed: one dict now and then: step, tokens and supervised tokens a second, share of the GEMM rate, peak memory.
        validation: (steps done, loss) of each validation.
        supervised_tokens: trained on.
        skipped: steps (1-based) whose gradients were not finite.
        spikes: steps (1-based) whose loss stood out.
        recent: losses of the last steps, against which the next one is held.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    speed: list[dict[str, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    supervised_tokens: int = 0
    skipped: list[int] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def is_spike(self, step: int, loss: float) -> bool:
        """Note a step's loss and say whether it is a spike: more than 8 robust deviations and 10% above the median of the last 50 steps."""
        window = self.recent
        self.recent = [*window[1 - _SPIKE_WINDOW :], loss]
        if len(window) < _SPIKE_LEAST:
            return False
        middle = statistics.median(window)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in window)
        spike = loss - middle > max(_SPIKE_DEVIATIONS * deviation, _SPIKE_SHARE * abs(middle))
        if spike:
            self.spikes.append(step)
        return spike

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add a logged step; numbers that are not finite have no place in JSON and are left out."""
        counts = {"loss_spikes": len(self.spikes), "skipped_steps": len(self.skipped)}
        self.metrics.append({"step": step, **{name: value for name, value in numbers.items() if math.isfinite(value)}, **counts})

    def dump(self) -> str:
        """Write it as text, from which floats come back bit for bit."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "History":
        """Read ``dump``'s text."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "validation": [(int(step), float(loss)) for step, loss in values["validation"]]})


def to_jsonl(metrics: list[dict[str, float]]) -> str:
    """Write one line of JSON a logged step."""
    return "".join(json.dumps(row) + "\n" for row in metrics)


def logged_metrics(store: Store, record: Record) -> list[dict[str, float]]:
    """Read what a training run logged, by step; empty where nothing was trained."""
    if all(file.name != "metrics.jsonl" for file in record.files):
        return []
    return [json.loads(line) for line in read_bytes(store, record, "metrics.jsonl").splitlines()]
