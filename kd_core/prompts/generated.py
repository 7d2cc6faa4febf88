"""Prompts that are generated: families of the reasoning-gym package.

Owns the two styles: ``question``, the family's own text with its answer as the reference, and ``running_totals`` for
chain_sum, a short program with a worked gold answer that a small character model can learn. The package is imported when
a row is asked for (2.7 s). Row i depends on (seed, i) only.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from kd_core.errors import SourceError
from kd_core.prompts.rows import RawRow
from kd_core.recipe import ReasoningGymSource

__all__ = ["generate_rows", "running_totals"]

_TERM = re.compile(r"[+-]?[0-9]+")


def running_totals(expression: str) -> tuple[str, str]:
    """Prompt and worked gold answer of a sum of two or more terms.

    >>> running_totals("7 + 5 - 9")
    ('7+5-9=', '7+5=12,12-9=3#3')
    >>> running_totals("3 - 9 + 2")
    ('3-9+2=', '3-9=-6,-6+2=-4#-4')
    """
    compact = expression.replace(" ", "")
    terms = _TERM.findall(compact)
    assert "".join(terms) == compact, f"{expression!r} is not a sum of plain terms"
    assert len(terms) >= 2, f"{expression!r} has one term"
    total, steps = int(terms[0]), []
    for term in terms[1:]:
        steps.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    return f"{compact}=", f"{','.join(steps)}#{total}"


def generate_rows(source: ReasoningGymSource, *, where: str) -> Iterator[RawRow]:
    """All `num` rows of a family, in order.

    Args:
        source: the family, its settings, size and seed.
        where: the recipe's path to this source, for messages.

    Raises:
        SourceError: no such family, a setting it does not take, or a style it cannot have.
    """
    rows = _create(source, where)
    for i in range(source.num):
        at = f"{where}: reasoning_gym {source.task} row {i} of seed {source.seed}"
        try:
            entry = rows[i]
        except Exception as error:  # a family may fail on settings that passed its own validation
            raise SourceError(f"{at} cannot be generated: {error}; change {where}.config") from error
        if source.style == "running_totals":
            prompt, gold = running_totals(entry["metadata"]["expression"])
            yield RawRow(at, prompt, gold, None)
        else:
            answer = entry["answer"]
            yield RawRow(at, entry["question"], None, None if answer is None else str(answer))


def _create(source: ReasoningGymSource, where: str) -> Any:
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        close = difflib.get_close_matches(source.task, DATASETS, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(sorted(DATASETS))}"
        raise SourceError(f"{where}.task: reasoning-gym has no task {source.task!r}; {hint}")
    allowed = [field.name for field in fields(DATASETS[source.task][1]) if field.name not in ("seed", "size")]
    _check_style(source, where)
    for name in source.config:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}? " if close else ""
            raise SourceError(
                f"{where}.config: {source.task} has no setting {name!r}; {hint}it takes {', '.join(allowed)}; size and seed stand beside it"
            )
    try:
        return create_dataset(source.task, size=source.num, seed=source.seed, **source.config)
    except (AssertionError, TypeError, ValueError) as error:
        raise SourceError(f"{where}.config: {source.task} refuses {source.config!r}: {error or 'a setting is out of range'}") from error


def _check_style(source: ReasoningGymSource, where: str) -> None:
    if source.style != "running_totals":
        return
    config: Mapping[str, object] = source.config
    if source.task != "chain_sum":
        raise SourceError(f"{where}.style: running_totals is for chain_sum only, found {source.task}; use style: question")
    if config.get("allow_negation"):
        raise SourceError(f"{where}.config.allow_negation: running_totals has no form for '3--9'; set it to false or use style: question")
    if config.get("min_terms", 2) == 1:
        raise SourceError(f"{where}.config.min_terms: a running total needs two terms; set it to 2 or more, or use style: question")
