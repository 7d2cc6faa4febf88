"""How stages say how far they are: one small value to one callable. Who shows it (rich, Prefect, nobody) is not their business."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Tick", "Ticker", "silent"]


@dataclass(frozen=True)
class Tick:
    """Progress of one step.

    Attributes:
        done: units finished.
        total: units in all.
        unit: 'rows', 'steps' ...
        note: a short live figure, for example 'loss 0.412'.
    """

    done: int
    total: int
    unit: str
    note: str = ""


Ticker = Callable[[Tick], None]


def silent(tick: Tick) -> None:
    """Show nothing."""
