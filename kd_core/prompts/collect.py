"""From sources to the prompts of a recipe: clean, remove doubles, split by hash, take out what overlaps with a benchmark.

Everything that is dropped is counted, and the counts add up: read = empty + too_long + duplicate + overlap.* + train +
validation + test. It refuses to end with nothing to train on or an empty suite.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from kd_core.curate import final_answer
from kd_core.errors import SourceError
from kd_core.prompts.cleaning import clean, normalise, prompt_id, side_of
from kd_core.prompts.decontaminate import SuiteIndex, index_suite, overlaps
from kd_core.prompts.rows import PromptRow, RawRow, to_table
from kd_core.prompts.sources import read_source
from kd_core.recipe import HeldOutSuite, Recipe, S3Options, Source, SourceSuite, Split, Suite, Task

__all__ = ["PromptSet", "collect_gold", "collect_prompts"]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a recipe.

    Attributes:
        table: PROMPT_SCHEMA, sorted by prompt_id, all three sides of the split.
        suites: suite name -> its items, PROMPT_SCHEMA, sorted by prompt_id.
        counts: read, empty, too_long, duplicate, train, validation, test; overlap.<suite> removed rows; suite.<suite>
            items, and empty.<suite>, duplicate.<suite>, no_answer.<suite> dropped ones.
    """

    table: pa.Table
    suites: dict[str, pa.Table]
    counts: dict[str, int]


_Rows = dict[str, PromptRow]  # by normalised prompt, in order of the sources


def collect_prompts(recipe: Recipe) -> PromptSet:
    """Read, clean, split and decontaminate the prompts of a recipe, and collect its suites.

    Raises:
        SourceError: a source cannot be read, nothing is left to train on, or a suite is empty.
    """
    prompts, task, s3 = recipe.prompts, recipe.task, recipe.run.s3
    counts: Counter[str] = Counter(dict.fromkeys(("read", "empty", "too_long", "duplicate", "train", "validation", "test"), 0))
    reader = _read_sources(prompts.sources, where="prompts.sources", task=task, s3=s3)
    rows = _clean_rows(reader, counts, split=prompts.split, max_characters=prompts.max_characters)
    benchmarks = _read_suites(recipe.evaluation.suites, counts, task=task, s3=s3)
    held_out = {key: row for key, row in rows.items() if row.split == "test"}
    learnt = {key: row for key, row in rows.items() if row.split != "test"}
    _remove_overlaps(learnt, _indices(benchmarks), counts)
    kept = [*learnt.values(), *held_out.values()]
    counts.update(row.split for row in kept)
    if not counts["train"]:
        raise SourceError(f"prompts: no training prompt is left: {_listed(counts)}; check prompts.sources, prompts.split and the suites")
    suites = {}
    for i, suite in enumerate(recipe.evaluation.suites):
        items = held_out.values() if isinstance(suite, HeldOutSuite) else benchmarks[suite.name].values()
        suites[suite.name] = _suite_table(suite, items, counts, where=f"evaluation.suites.{i}")
    return PromptSet(to_table(kept), suites, dict(counts))


def collect_gold(
    sources: Sequence[Source], *, task: Task, split: Split, suites: Sequence[Suite], max_characters: int, s3: S3Options
) -> tuple[pa.Table, dict[str, int]]:
    """Gold data of a trained teacher: rows with a worked gold answer, on the train side by hash, off every benchmark.

    Args:
        sources: `TrainedTeacher.sources`.
        task: the recipe's task.
        split: the recipe's `prompts.split`, so that what is held out there is held out here.
        suites: the recipe's suites; those of kind source are read and their overlaps removed.
        max_characters: longest prompt, characters.
        s3: how to reach s3:// files.

    Returns:
        A PROMPT_SCHEMA table sorted by prompt_id, and the counts: read = empty + too_long + no_gold + duplicate + held_out +
        overlap.* + train.

    Raises:
        SourceError: a source cannot be read, or nothing is left.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("read", "empty", "too_long", "no_gold", "duplicate", "held_out", "train"), 0))
    reader = _read_sources(sources, where="teacher.sources", task=task, s3=s3)
    rows = _clean_rows(reader, counts, split=split, max_characters=max_characters, gold_only=True)
    learnt = {key: row for key, row in rows.items() if row.split == "train"}
    counts["held_out"] = len(rows) - len(learnt)
    _remove_overlaps(learnt, _indices(_read_suites(suites, Counter(), task=task, s3=s3)), counts)
    counts["train"] = len(learnt)
    if not learnt:
        raise SourceError(
            f"teacher.sources: no gold row is left to train the teacher on: {_listed(counts)}; check the sources' gold templates"
        )
    return to_table(learnt.values()), dict(counts)


def _read_sources(sources: Iterable[Source], *, where: str, task: Task, s3: S3Options) -> Iterator[tuple[str, RawRow]]:
    for i, source in enumerate(sources):
        yield from _with_references(read_source(source, where=f"{where}.{i}", s3=s3), task, where=f"{where}.{i}")


def _with_references(rows: Iterable[tuple[str, RawRow]], task: Task, *, where: str) -> Iterator[tuple[str, RawRow]]:
    """Fill absent references from the gold answers; refuse a source in which no gold answer has the task's marker."""
    unmarked: RawRow | None = None
    marked = False
    for label, row in rows:
        reference = row.reference
        if reference is None and row.gold is not None and row.gold.strip():
            reference = final_answer(row.gold, task)
            marked = marked or reference is not None
            unmarked = row if reference is None else unmarked
        yield label, replace(row, reference=reference)
    if unmarked is not None and not marked:
        raise SourceError(
            f"{where}: no gold answer holds task.answer_marker {task.answer_marker!r}; {unmarked.at} ends in "
            f"{(unmarked.gold or '')[-60:]!r}; "
            f"correct the marker, or state {where}.reference"
        )


def _clean_rows(
    rows: Iterable[tuple[str, RawRow]],
    counts: Counter[str],
    *,
    split: Split | None,
    max_characters: int | None,
    gold_only: bool = False,
) -> _Rows:
    """Clean rows and drop doubles; `split` None puts every row on the test side."""
    kept: _Rows = {}
    for source, raw in rows:
        counts["read"] += 1
        prompt, gold, reference = (_clean_or_none(text, raw.at) for text in (raw.prompt, raw.gold, raw.reference))
        if prompt is None:
            counts["empty"] += 1
        elif max_characters is not None and len(prompt) > max_characters:
            counts["too_long"] += 1
        elif gold_only and gold is None:
            counts["no_gold"] += 1
        elif (key := normalise(prompt)) in kept:
            counts["duplicate"] += 1
        else:
            side = "test" if split is None else side_of(key, split)
            kept[key] = PromptRow(prompt_id(key), prompt, gold, reference, side, source)
    return kept


def _clean_or_none(text: str | None, at: str) -> str | None:
    if text is None:
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{at}: half of a UTF-16 pair ({error.object[error.start]!r}) is no text; repair the row") from error
    return clean(text) or None


def _read_suites(suites: Sequence[Suite], counts: Counter[str], *, task: Task, s3: S3Options) -> dict[str, _Rows]:
    """All items of every source suite, before any limit: a longer suite later must not have been trained on."""
    found: dict[str, _Rows] = {}
    for i, suite in enumerate(suites):
        if isinstance(suite, SourceSuite):
            where = f"evaluation.suites.{i}.source"
            reader = _with_references(read_source(suite.source, where=where, s3=s3), task, where=where)
            own: Counter[str] = Counter()
            found[suite.name] = _clean_rows(reader, own, split=None, max_characters=None)
            counts.update({f"{reason}.{suite.name}": own[reason] for reason in ("empty", "duplicate")})
    return found


def _indices(benchmarks: Mapping[str, _Rows]) -> list[SuiteIndex]:
    return [index_suite(name, rows) for name, rows in benchmarks.items()]


def _remove_overlaps(rows: _Rows, indices: Sequence[SuiteIndex], counts: Counter[str]) -> None:
    """Remove rows that overlap with a suite, counted for the first such suite."""
    for index in indices:
        overlapping = [key for key in rows if overlaps(index, key)]
        counts[f"overlap.{index.name}"] = len(overlapping)
        for key in overlapping:
            del rows[key]


def _suite_table(suite: Suite, items: Iterable[PromptRow], counts: Counter[str], *, where: str) -> pa.Table:
    everything = list(items)
    answerable = [row for row in everything if row.reference is not None or row.gold is not None]
    table = to_table(answerable).slice(0, suite.limit)
    counts[f"no_answer.{suite.name}"] = len(everything) - len(answerable)
    counts[f"suite.{suite.name}"] = table.num_rows
    if not table.num_rows:
        raise SourceError(
            f"{where}: suite {suite.name} has no item with a gold answer or a reference, of {len(everything)} read; check its source"
        )
    return table


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {num}" for name, num in counts.items())
