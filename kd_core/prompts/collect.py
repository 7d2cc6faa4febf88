"""From sources to the prompts of a recipe: clean, remove duplicates, split by hash, take out copies of what is held out.

Everything that is dropped is counted, and the counts add up: read = empty + too_long + duplicate + overlap.* + train +
validation + test. It refuses to end with nothing to train on or an empty suite.

The side of a prompt is that of its words, and copies stay together: of a group of near copies the one with the smallest id
decides. So a new row moves others only if it is a near copy of them and its id is the smallest of the group.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa

from kd_core.curate import final_answer
from kd_core.errors import SourceError
from kd_core.prompts.cleaning import Side, clean, prompt_id, side_of
from kd_core.prompts.decontaminate import Wording, groups, index_suite, overlap, set_aside_common, wording
from kd_core.prompts.inputs import content_hash
from kd_core.prompts.rows import PromptRow, RawRow, to_table
from kd_core.prompts.sources import read_source
from kd_core.prompts.turns import Turn, prompt_key, prompt_text, user_words
from kd_core.recipe import AnyTask, HeldOutSuite, Recipe, S3Options, Source, SourceSuite, Split, Suite, Task

__all__ = ["CLEANING_VERSION", "PromptSet", "collect_gold", "collect_prompts"]

CLEANING_VERSION = 1
"""Raised when the same sources give other prompts: it is part of the prompts' identity, so no old split is taken for one of today."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a recipe.

    Attributes:
        table: PROMPT_SCHEMA, sorted by prompt_id, all three sides of the split.
        suites: suite name -> its items, PROMPT_SCHEMA, sorted by prompt_id.
        counts: read, empty, too_long, duplicate, train, validation, test; overlap.<suite> removed rows, of which
            near.<suite> are near copies and the others have an item's very words (suites 'test_side' and 'validation_side' are
            the recipe's own); regrouped rows, which are on the side of a near copy; suite.<suite> items, and empty.<suite>,
            duplicate.<suite>, no_answer.<suite> dropped ones.
    """

    table: pa.Table
    suites: dict[str, pa.Table]
    counts: dict[str, int]


_Rows = dict[str, PromptRow]  # by normalised prompt, in order of the sources


Keep = Callable[[bytes], str]
"""Keeps an image and gives its hash."""


def collect_prompts(recipe: Recipe, keep: Keep | None = None) -> PromptSet:
    """Read, clean, split and decontaminate the prompts of a recipe, and collect its suites.

    Args:
        recipe: the recipe.
        keep: takes the images; None where they are only looked at.

    Raises:
        SourceError: a source cannot be read, nothing is left to train on, or a suite is empty.
    """
    prompts, task, s3 = recipe.prompts, recipe.task, recipe.run.s3
    counts: Counter[str] = Counter(dict.fromkeys(("read", "empty", "too_long", "duplicate", "train", "validation", "test"), 0))
    reader = _read_sources(prompts.sources, where="prompts.sources", task=task, s3=s3, keep=keep)
    rows = _clean_rows(reader, counts, task=task, max_characters=prompts.max_characters)
    benchmarks = _read_suites(recipe.evaluation.suites, counts, task=task, s3=s3, keep=keep)
    kept = _held_apart(rows.values(), benchmarks, counts, split=prompts.split)
    counts.update(row.split for row in kept)
    if not counts["train"]:
        raise SourceError(f"prompts: no training prompt is left: {_listed(counts)}; check prompts.sources, prompts.split and the suites")
    suites = {}
    for i, suite in enumerate(recipe.evaluation.suites):
        own = [row for row in kept if row.split == "test"]
        items = own if isinstance(suite, HeldOutSuite) else benchmarks[suite.name].values()
        suites[suite.name] = _suite_table(suite, items, counts, where=f"evaluation.suites.{i}")
    return PromptSet(to_table(kept), suites, dict(counts))


def collect_gold(
    sources: Sequence[Source],
    *,
    task: AnyTask,
    split: Split,
    suites: Sequence[Suite],
    max_characters: int,
    s3: S3Options,
    keep: Keep | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """Gold data of a trained teacher: rows with a worked gold answer, on the train side by hash, off every benchmark.

    Args:
        sources: `TrainedTeacher.sources`.
        task: the recipe's task.
        split: the recipe's `prompts.split`, so that what is held out there is held out here.
        suites: the recipe's suites; those of kind source are read and their overlaps removed.
        max_characters: longest prompt, characters.
        s3: how to reach s3:// files.
        keep: takes the images; None where they are only looked at.

    A near copy of a prompt in `prompts.sources` that is held out there is not seen here: only its very words are, by their hash.

    Returns:
        A PROMPT_SCHEMA table sorted by prompt_id, and the counts: read = empty + too_long + no_gold + duplicate + held_out +
        overlap.* + train.

    Raises:
        SourceError: a source cannot be read, or nothing is left.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("read", "empty", "too_long", "no_gold", "duplicate", "held_out", "train"), 0))
    reader = _read_sources(sources, where="teacher.sources", task=task, s3=s3, keep=keep)
    rows = _clean_rows(reader, counts, task=task, max_characters=max_characters, gold_only=True)
    kept = _held_apart(rows.values(), _read_suites(suites, Counter(), task=task, s3=s3, keep=keep), counts, split=split)
    learnt = [row for row in kept if row.split == "train"]
    counts["held_out"] = len(kept) - len(learnt)
    counts["train"] = len(learnt)
    if not learnt:
        raise SourceError(
            f"teacher.sources: no gold row is left to train the teacher on: {_listed(counts)}; check the sources' gold templates"
        )
    return to_table(learnt), dict(counts)


def _read_sources(
    sources: Iterable[Source], *, where: str, task: AnyTask, s3: S3Options, keep: Keep | None
) -> Iterator[tuple[str, RawRow]]:
    for i, source in enumerate(sources):
        yield from _read_one(source, where=f"{where}.{i}", task=task, s3=s3, keep=keep)


def _read_one(source: Source, *, where: str, task: AnyTask, s3: S3Options, keep: Keep | None) -> Iterator[tuple[str, RawRow]]:
    """Rows of a source; an image's prompt is its hash, and a class is its own reference."""
    if isinstance(task, Task):
        yield from _with_references(read_source(source, where=where, s3=s3), task, where=where)
        return
    for label, row in read_source(source, where=where, s3=s3, images=task.input == "image"):
        if row.media is not None:
            row = replace(row, prompt=(keep or content_hash)(row.media), media=None)
        yield label, replace(row, reference=row.gold)


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
    task: AnyTask,
    max_characters: int | None,
    gold_only: bool = False,
) -> _Rows:
    """Clean rows and drop duplicates; all are on the test side until they are split."""
    kept: _Rows = {}
    for source, raw in rows:
        counts["read"] += 1
        turns = _clean_turns(raw, task)
        gold, reference = (_clean_or_none(text, raw.at) for text in (raw.gold, raw.reference))
        if not turns:
            counts["empty"] += 1
        elif max_characters is not None and sum(len(turn.content) for turn in turns) > max_characters:
            counts["too_long"] += 1
        elif gold_only and gold is None:
            counts["no_gold"] += 1
        elif (key := prompt_key(prompt := prompt_text(turns))) in kept:
            counts["duplicate"] += 1
        else:
            kept[key] = PromptRow(prompt_id(key), prompt, gold, reference, "test", source)
    return kept


def _clean_turns(raw: RawRow, task: AnyTask) -> tuple[Turn, ...]:
    """The turns of a prompt, cleaned; none where the user says nothing.

    Raises:
        SourceError: the task's template cannot word several turns.
    """
    said = (Turn("user", raw.prompt),) if isinstance(raw.prompt, str) else raw.prompt or ()
    turns = tuple(Turn(turn.role, _clean_or_none(turn.content, raw.at) or "") for turn in said)
    if not any(turn.role == "user" and turn.content for turn in turns):
        return ()
    if len(turns) > 1 and not (isinstance(task, Task) and task.template == "chat"):
        roles = ", ".join(turn.role for turn in turns[:4]) + (" ..." if len(turns) > 4 else "")
        raise SourceError(f"{raw.at}: a prompt of {len(turns)} turns ({roles}) needs the model's chat template; set task.template: chat")
    return turns


def _clean_or_none(text: str | None, at: str) -> str | None:
    if text is None:
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{at}: half of a UTF-16 pair ({error.object[error.start]!r}) is no text; repair the row") from error
    return clean(text) or None


def _read_suites(suites: Sequence[Suite], counts: Counter[str], *, task: AnyTask, s3: S3Options, keep: Keep | None) -> dict[str, _Rows]:
    """All items of every source suite, before any limit: a longer suite later must not have been trained on."""
    found: dict[str, _Rows] = {}
    for i, suite in enumerate(suites):
        if isinstance(suite, SourceSuite):
            where = f"evaluation.suites.{i}.source"
            reader = _read_one(suite.source, where=where, task=task, s3=s3, keep=keep)
            own: Counter[str] = Counter()
            found[suite.name] = _clean_rows(reader, own, task=task, max_characters=None)
            counts.update({f"{reason}.{suite.name}": own[reason] for reason in ("empty", "duplicate")})
    return found


def _held_apart(rows: Iterable[PromptRow], benchmarks: Mapping[str, _Rows], counts: Counter[str], *, split: Split) -> list[PromptRow]:
    """Split rows, near copies on one side, and keep them off every suite, the recipe's own sides included."""
    everything = list(rows)
    items = [item for suite in benchmarks.values() for item in suite.values()]
    wordings = set_aside_common([wording(user_words(row.prompt)) for row in [*everything, *items]])
    prompts, rest = wordings[: len(everything)], iter(wordings[len(everything) :])
    pairs = list(zip(_split(everything, prompts, counts, split), prompts, strict=True))
    for name, suite in benchmarks.items():
        pairs = _without_copies(pairs, name, list(islice(rest, len(suite))), ("train", "validation"), counts)
    for held_out in ("test", "validation"):
        own = [words for row, words in pairs if row.split == held_out]
        others: tuple[Side, ...] = ("train", "validation") if held_out == "test" else ("train",)
        pairs = _without_copies(pairs, f"{held_out}_side", own, others, counts)
    return [row for row, _ in pairs]


def _split(rows: Sequence[PromptRow], wordings: Sequence[Wording], counts: Counter[str], split: Split) -> list[PromptRow]:
    sides = [side_of(one.spelling, split) for one in wordings]
    group_of = groups(wordings)
    deciding: dict[int, int] = {}
    for i, group in enumerate(group_of):
        deciding[group] = min(deciding.get(group, i), i, key=lambda j: rows[j].prompt_id)
    counts["regrouped"] = sum(side != sides[deciding[group]] for side, group in zip(sides, group_of, strict=True))
    return [replace(row, split=sides[deciding[group]]) for row, group in zip(rows, group_of, strict=True)]


def _without_copies(
    pairs: list[tuple[PromptRow, Wording]], name: str, items: Sequence[Wording], sides: Collection[Side], counts: Counter[str]
) -> list[tuple[PromptRow, Wording]]:
    """Without the rows of these sides that are copies of an item, counted for this suite."""
    index = index_suite(items)
    found = [overlap(index, words) if row.split in sides else None for row, words in pairs]
    counts[f"overlap.{name}"] = sum(how is not None for how in found)
    counts[f"near.{name}"] = found.count("near")
    return [pair for pair, how in zip(pairs, found, strict=True) if how is None]


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
