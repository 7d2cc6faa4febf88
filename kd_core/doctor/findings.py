"""What a check says: a finding, or that there was nothing to examine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kd_core.errors import KDError

__all__ = ["Finding", "Skipped", "finding"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: its name, and what was found against what is required, and what to do."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str


class Skipped(Exception):  # noqa: N818 (no error)
    """A check that has nothing to examine in this recipe; the message says why."""


def finding(name: str, check: Callable[[], str]) -> Finding:
    """Run a check; one that breaks is a failed one."""
    try:
        return Finding(name, "ok", check())
    except Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except KDError as error:
        return Finding(name, "failed", str(error))
    except Exception as error:  # what a defect looks like from here: an index out of range, a shape that does not fit
        return Finding(name, "failed", f"broke with {type(error).__name__}: {error}")
