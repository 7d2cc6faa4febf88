"""How stages say how far they are: one small value to one callable. Who shows it (rich, Prefect, nobody) is not their business."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Pace", "Tick", "Ticker", "silent"]


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


@dataclass
class Pace:
    """Amounts a second of the units that were gone over since the last reading.

    >>> pace = Pace({"rows": 6, "tokens": 4800}, since=10.0)
    >>> pace.read(now=12.0)
    '3.0 rows/s, 2,400 tokens/s'
    >>> pace.amounts
    {'rows': 0, 'tokens': 0}
    """

    amounts: dict[str, int] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def add(self, **amounts: int) -> None:
        """Count more of some units."""
        for unit, amount in amounts.items():
            self.amounts[unit] = self.amounts.get(unit, 0) + amount

    def read(self, now: float | None = None) -> str:
        """Rates since the last reading, in words.

        Args:
            now: seconds of the monotonic clock; None asks it.
        """
        now = time.monotonic() if now is None else now
        seconds = max(now - self.since, 1e-6)
        rates = {unit: amount / seconds for unit, amount in self.amounts.items()}
        self.amounts, self.since = dict.fromkeys(self.amounts, 0), now
        return ", ".join(f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s" for unit, rate in rates.items())
