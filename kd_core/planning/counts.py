"""Counts of a recipe's prompts and rows, before any of them is made.

A finished record is believed first, then the sources (files and generated families are read in memory, hub data sets are never
fetched), then the recipe's own limits. What none of them tells is None.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_core.artifacts import read_bytes
from kd_core.evaluate.suites import expect_measurable, suite_items
from kd_core.planning.basis import Basis
from kd_core.prompts import collect_prompts, estimate_rows
from kd_core.recipe import DatasetSource, HeldOutSuite, Source, SourceSuite, TrainedTeacher, Training
from kd_core.summaries import CurateSummary, of

__all__ = ["Counts", "PromptCounts", "has_gold"]


@dataclass(frozen=True)
class PromptCounts:
    """Numbers of prompts of a recipe.

    Attributes:
        table: PROMPT_SCHEMA, or None where a hub data set would have to be fetched.
        rows: all three sides; from `limit` where nothing was read.
        train: of them, for training.
        gold: of those, with a worked gold answer.
        items: of all suites.
        suites: PROMPT_SCHEMA of each suite by its name; empty where nothing was read.
    """

    table: pa.Table | None
    rows: int | None
    train: int | None
    gold: int | None
    items: int | None
    suites: Mapping[str, pa.Table] = field(default_factory=dict)

    def mean_characters(self, column: str) -> float | None:
        """Mean length of column 'prompt' or 'gold' in characters; None where there are none, or nothing was read."""
        if self.table is None:
            return None
        mean = pc.mean(pc.utf8_length(self.table[column])).as_py()
        return None if mean is None else float(mean)


@dataclass(frozen=True)
class Counts:
    """Numbers of prompts and rows of a recipe."""

    basis: Basis

    @cached_property
    def prompts(self) -> PromptCounts:
        """Prompts of the recipe: from their record, or collected in memory, or guessed from the limits of hub data sets."""
        record, suites = self.basis.records["prompts"], self.basis.recipe.evaluation.suites
        sources = [*self.basis.recipe.prompts.sources, *(suite.source for suite in suites if isinstance(suite, SourceSuite))]
        if record is not None:
            done = record
            suite_tables = suite_items(self.basis.recipe, lambda name: pq.read_table(BytesIO(read_bytes(self.basis.store, done, name))))
            table = pq.read_table(BytesIO(read_bytes(self.basis.store, record, "prompts.parquet")))
            expect_measurable(self.basis.recipe, suite_tables)
        elif any(isinstance(source, DatasetSource) for source in sources):
            return self._guessed_prompts()
        else:
            found = collect_prompts(self.basis.recipe)
            expect_measurable(self.basis.recipe, found.suites)
            table, suite_tables = found.table, found.suites
        train = table.filter(pc.equal(table["split"], "train"))
        items = sum(suite.num_rows for suite in suite_tables.values())
        return PromptCounts(table, table.num_rows, train.num_rows, train.num_rows - train["gold"].null_count, items, suite_tables)

    def _guessed_prompts(self) -> PromptCounts:
        split = self.basis.recipe.prompts.split
        sources = self.basis.recipe.prompts.sources
        rows = _total(estimate_rows(source) for source in sources)
        held_out = None if rows is None else round(rows * split.test)
        items = []
        for suite in self.basis.recipe.evaluation.suites:
            whole = held_out if isinstance(suite, HeldOutSuite) else estimate_rows(suite.source)
            items.append(min((n for n in (whole, suite.limit) if n is not None), default=None))
        gold_rows = _total(estimate_rows(source) for source in sources if has_gold(source))
        share = 1.0 - split.test - split.validation
        train, gold = (None if n is None else round(n * share) for n in (rows, gold_rows))
        return PromptCounts(None, rows, train, gold, _total(items))

    @property
    def teacher_rows(self) -> int | None:
        """Gold rows that a trained teacher learns from, before duplicates and held-out ones are taken out."""
        teacher = self.basis.recipe.teacher
        return _total(estimate_rows(source) for source in teacher.sources) if isinstance(teacher, TrainedTeacher) else None

    @property
    def answer_rows(self) -> int | None:
        """Answers asked for."""
        answers, train = self.basis.recipe.answers, self.prompts.train
        return 0 if answers is None else None if train is None else train * answers.num_samples

    @property
    def gold_rows(self) -> int | None:
        """Worked gold answers mixed in."""
        if (record := self.basis.records["curate"]) is not None:
            return of(record, CurateSummary).counts["gold"]
        limits = [n for n in (self.prompts.gold, self.basis.recipe.curate.gold_rows) if n is not None]
        return None if self.prompts.gold is None else min(limits)

    @property
    def curated_rows(self) -> int | None:
        """Rows the student learns from; before curation all answers and gold rows, an upper bound."""
        if (record := self.basis.records["curate"]) is not None:
            return of(record, CurateSummary).rows
        return _total((self.answer_rows, self.gold_rows))

    @property
    def training(self) -> Training | None:
        """The student's training with its steps counted; by epochs, None where the rows are not known."""
        training, rows = self.basis.recipe.training, self.curated_rows
        return None if training.steps is None and rows is None else training.for_rows(rows or 0)


def has_gold(source: Source) -> bool:
    """Tell whether rows of a source have a worked gold answer."""
    if source.kind == "reasoning_gym":
        return source.style == "running_totals"
    return source.gold is not None or source.messages is not None


def _total(numbers: Iterable[int | None]) -> int | None:
    """Sum of numbers; None if one is unknown."""
    found = list(numbers)
    return None if any(n is None for n in found) else sum(n for n in found if n is not None)
