"""What can be known of a recipe without computing any of it: counts, lengths and sizes.

A finished record is believed first, then the sources (files and generated families are read in memory, hub data sets are
never fetched), then the recipe's own numbers. What none of them tells is None, but for lengths of texts that nobody has
read: those are assumed, and ``lengths_assumed`` says so. Reads the store, writes nothing, needs no torch.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import islice
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from kd_core.artifacts import Record, find, read_bytes
from kd_core.errors import RecipeError
from kd_core.evaluate.suites import expect_measurable, suite_items
from kd_core.fingerprint import fingerprint
from kd_core.planning.costs import GROUP_BYTES
from kd_core.prompts import collect_prompts, estimate_rows
from kd_core.prompts.sources import read_source
from kd_core.recipe import (
    DatasetSource,
    HeldOutSuite,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    SoftLabels,
    Source,
    SourceSuite,
    StudentFromConfig,
    TrainedTeacher,
)
from kd_core.rows.keys import about_hidden_states, answer_namespace, answer_rows, soft_label_key, soft_label_namespace
from kd_core.rows.table import RowCache, Snapshot
from kd_core.stages.graph import Graph, champion
from kd_core.store import Store
from kd_core.teacher.columns import stored_columns
from kd_core.teacher.sizes import Size, llama_size, stored_size

__all__ = ["CachedRows", "Known", "PromptCounts", "StoredLabels"]

_CHARACTERS_PER_TOKEN = 4.0  # of common sub-word tokenizers on English text
_UNREAD_CHARACTERS = {"prompt": 240.0, "gold": 400.0}  # between GSM8K (235 and 290) and MATH (200 and 550)
_SAMPLE_ROWS = 256
_NEWEST_RECORDS = 20
_POLICY: TypeAdapter[SoftLabels] = TypeAdapter(SoftLabels)


@dataclass(frozen=True)
class PromptCounts:
    """Prompts of a recipe.

    Attributes:
        table: PROMPT_SCHEMA, or None where a hub data set would have to be fetched.
        rows: all three sides; from `limit` where nothing was read.
        train: of them, for training.
        gold: of those, with a worked gold answer.
        items: of all suites.
    """

    table: pa.Table | None
    rows: int | None
    train: int | None
    gold: int | None
    items: int | None

    def mean_characters(self, column: str) -> float | None:
        """Of 'prompt' or 'gold'; None where there are none, or nothing was read."""
        if self.table is None:
            return None
        mean = pc.mean(pc.utf8_length(self.table[column])).as_py()
        return None if mean is None else float(mean)


@dataclass(frozen=True)
class CachedRows:
    """Rows that a stage asks for, and what its shared table holds of them.

    Attributes:
        rows: asked for.
        cached: found.
        missing_tokens: (tokens, supervised tokens) of the others; None where rows are not known one by one.
        row_bytes: mean stored bytes of the table's rows, without what a row group takes beside them; None if it is empty.
    """

    rows: int | None
    cached: int
    missing_tokens: tuple[int, int] | None = None
    row_bytes: float | None = None


@dataclass(frozen=True)
class StoredLabels:
    """Soft labels that the store holds, by which estimates of bytes are corrected.

    Attributes:
        policy: what was kept.
        num_columns: of the teacher.
        rows: of the table.
        tokens: of those rows, prompts included.
        positions: supervised tokens of those rows.
        groups: row groups of all shards.
        bytes: of all shards.
    """

    policy: SoftLabels
    num_columns: int
    rows: int
    tokens: float
    positions: int
    groups: int
    bytes: int


@dataclass(frozen=True)
class Known:
    """One recipe against one store.

    Attributes:
        recipe: the recipe.
        store: where artifacts and rows are.
        nodes: its graph.
        records: node name -> finished record, or None.
    """

    recipe: Recipe
    store: Store
    nodes: Graph
    records: Mapping[str, Record | None]

    @cached_property
    def prompts(self) -> PromptCounts:
        """The recipe's prompts: from their record, or collected in memory, or guessed from the limits of hub data sets."""
        record, suites = self.records["prompts"], self.recipe.evaluation.suites
        sources = [*self.recipe.prompts.sources, *(suite.source for suite in suites if isinstance(suite, SourceSuite))]
        if record is not None:
            done = record
            suite_tables = suite_items(self.recipe, lambda name: pq.read_table(BytesIO(read_bytes(self.store, done, name))))
            table = pq.read_table(BytesIO(read_bytes(self.store, record, "prompts.parquet")))
            expect_measurable(self.recipe, suite_tables)
            items = sum(suite.num_rows for suite in suite_tables.values())
        elif any(isinstance(source, DatasetSource) for source in sources):
            return self._guessed_prompts()
        else:
            found = collect_prompts(self.recipe)
            expect_measurable(self.recipe, found.suites)
            table, items = found.table, sum(suite.num_rows for suite in found.suites.values())
        train = table.filter(pc.equal(table["split"], "train"))
        return PromptCounts(table, table.num_rows, train.num_rows, train.num_rows - train["gold"].null_count, items)

    def _guessed_prompts(self) -> PromptCounts:
        split = self.recipe.prompts.split
        sources = self.recipe.prompts.sources
        rows = _total(estimate_rows(source) for source in sources)
        held_out = None if rows is None else round(rows * split.test)
        items = []
        for suite in self.recipe.evaluation.suites:
            whole = held_out if isinstance(suite, HeldOutSuite) else estimate_rows(suite.source)
            items.append(min((n for n in (whole, suite.limit) if n is not None), default=None))
        gold_rows = _total(estimate_rows(source) for source in sources if _has_gold(source))
        share = 1.0 - split.test - split.validation
        train, gold = (None if n is None else round(n * share) for n in (rows, gold_rows))
        return PromptCounts(None, rows, train, gold, _total(items))

    @cached_property
    def _finished(self) -> dict[str, list[Record]]:
        return {}

    def finished(self, stage: str) -> list[Record]:
        """The newest finished records of a stage, of any recipe, oldest first: what rates are measured on."""
        if stage not in self._finished:
            infos = [info for info in self.store.list(f"artifacts/{stage}/") if info.key.endswith("/record.json")]
            newest = sorted(infos, key=lambda info: (info.modified_seconds, info.key))[-_NEWEST_RECORDS:]
            records = (find(self.store, stage, info.key.split("/")[-2]) for info in newest)
            self._finished[stage] = [record for record in records if record is not None]
        return self._finished[stage]

    # ------------------------------------------------------------------------------------------ lengths, in tokens

    def tokens_of(self, characters: float | None) -> float | None:
        """Tokens of a text: one a character for a character tokenizer, else four characters a token."""
        if characters is None or isinstance(self.recipe.teacher, TrainedTeacher):
            return characters
        return characters / _CHARACTERS_PER_TOKEN

    @cached_property
    def prompt_tokens(self) -> float | None:
        """Mean length of a prompt."""
        return self.tokens_of(_UNREAD_CHARACTERS["prompt"] if self.lengths_assumed else self.prompts.mean_characters("prompt"))

    @cached_property
    def gold_tokens(self) -> float | None:
        """Mean length of a worked gold answer, with its end token; None where there are none."""
        characters = self.prompts.mean_characters("gold")
        if self.lengths_assumed and any(_has_gold(source) for source in self.recipe.prompts.sources):
            characters = _UNREAD_CHARACTERS["gold"]
        tokens = self.tokens_of(characters)
        return None if tokens is None else tokens + 1.0

    @property
    def lengths_assumed(self) -> bool:
        """Whether no prompt has been read, so that lengths of prompts and gold answers are mere assumptions."""
        return self.prompts.table is None

    def answer_tokens(self, max_tokens: int) -> float:
        """Expected length of a generated answer: of this teacher's answers, else of gold ones if they were read, at most the bound."""
        gold = None if self.lengths_assumed else self.gold_tokens
        return min(float(max_tokens), self._answered_tokens or gold or float(max_tokens))

    @cached_property
    def _answered_tokens(self) -> float | None:
        """Mean length of an answer in the newest finished record of the same growing table."""
        if self._answer_table is None:
            return None
        namespace = self._answer_table[0].namespace
        summaries = [record.summary for record in self.finished("answers") if record.summary["namespace"] == namespace]
        return summaries[-1]["tokens"] / summaries[-1]["rows"] if summaries else None

    @cached_property
    def row_tokens(self) -> tuple[float, float] | None:
        """Mean (tokens, supervised tokens) of a row the student learns from."""
        record = self.records["curate"]
        if record is not None:
            return record.summary["tokens"] / record.summary["rows"], record.summary["supervised_tokens"] / record.summary["rows"]
        answers = self.recipe.answers
        supervised = self.gold_tokens if answers is None else self.answer_tokens(answers.max_tokens)
        if self.prompt_tokens is None or supervised is None:
            return None
        return self.prompt_tokens + supervised, supervised

    @cached_property
    def teacher_row_tokens(self) -> float | None:
        """Mean length of a row that a trained teacher learns from, over the first rows of each source."""
        teacher = self.recipe.teacher
        if not isinstance(teacher, TrainedTeacher) or any(isinstance(source, DatasetSource) for source in teacher.sources):
            return None
        lengths = [
            len(row.prompt) + len(row.gold) + 1.0
            for i, source in enumerate(teacher.sources)
            for _, row in islice(read_source(source, where=f"teacher.sources.{i}", s3=self.recipe.run.s3), _SAMPLE_ROWS)
            if row.prompt and row.gold
        ]
        return fmean(lengths) if lengths else None

    # ------------------------------------------------------------------------------------------ rows

    @property
    def teacher_rows(self) -> int | None:
        """Gold rows that a trained teacher learns from, before doubles and held-out ones are taken out."""
        teacher = self.recipe.teacher
        return _total(estimate_rows(source) for source in teacher.sources) if isinstance(teacher, TrainedTeacher) else None

    @property
    def answer_rows(self) -> int | None:
        """Answers asked for."""
        answers, train = self.recipe.answers, self.prompts.train
        return 0 if answers is None else None if train is None else train * answers.num_samples

    @property
    def gold_rows(self) -> int | None:
        """Worked gold answers mixed in."""
        if (record := self.records["curate"]) is not None:
            return int(record.summary["counts"]["gold"])
        limits = [n for n in (self.prompts.gold, self.recipe.curate.gold_rows) if n is not None]
        return None if self.prompts.gold is None else min(limits)

    @property
    def curated_rows(self) -> int | None:
        """Rows the student learns from; before curation all answers and gold rows, an upper bound."""
        if (record := self.records["curate"]) is not None:
            return int(record.summary["rows"])
        return _total((self.answer_rows, self.gold_rows))

    @cached_property
    def _answer_table(self) -> tuple[RowCache, Snapshot, list[str]] | None:
        """The answer table, and the keys that it holds of this recipe's; None without a finished teacher or known prompts."""
        answers, teacher = self.recipe.answers, self.records["teacher"]
        if answers is None or teacher is None or self.prompts.table is None:
            return None
        cache = RowCache(self.store, "answers", answer_namespace(self.recipe, answers, teacher))
        snapshot = cache.snapshot()
        held = snapshot.keys()
        return cache, snapshot, [key for key, _ in answer_rows(self.recipe, answers, teacher, self.prompts.table) if key in held]

    @cached_property
    def answers(self) -> CachedRows:
        """Answers: exact where prompts and teacher are known."""
        if self._answer_table is None:
            return CachedRows(self.answer_rows, 0)
        _, snapshot, keys = self._answer_table
        return CachedRows(self.answer_rows, len(keys), None, _row_bytes(snapshot))

    def soft_labels(self, policy: SoftLabels) -> CachedRows:
        """Soft labels under a policy: exact after curation.

        Before it, rows are all answers and gold rows; the cached ones are a lower bound: answers that are there and were
        scored. Gold rows cannot be keyed without a tokenizer.
        """
        teacher, done = self.records["teacher"], self.records.get("soft_labels")
        if done is not None and policy == self.recipe.soft_labels:
            return CachedRows(done.summary["rows"], done.summary["rows"], (0, 0))
        return self._scored_rows("soft_labels", None if teacher is None else soft_label_namespace(policy, teacher))

    @cached_property
    def hidden_states(self) -> CachedRows:
        """Hidden states that the recipe asks for; counted like soft labels."""
        wanted, teacher = self.recipe.hidden_states, self.records["teacher"]
        found = None if wanted is None or teacher is None else fingerprint(about_hidden_states(wanted, teacher))
        return self._scored_rows("hidden_states", found)

    def _scored_rows(self, table: str, namespace: str | None) -> CachedRows:
        held: Collection[str] = () if namespace is None else RowCache(self.store, table, namespace).snapshot().keys()
        if namespace is None or not held:
            return CachedRows(self.curated_rows, 0, None if self.curated is None else _sums(self.curated))
        if self.curated is None:
            return CachedRows(self.curated_rows, self._scored_answers(namespace, held))
        missing = [row for row in self.curated if soft_label_key(namespace, *row) not in held]
        return CachedRows(len(self.curated), len(self.curated) - len(missing), _sums(missing))

    @cached_property
    def curated(self) -> list[tuple[list[int], int]] | None:
        """(token ids, first supervised position) of every curated row; None before curation."""
        if (record := self.records["curate"]) is None:
            return None
        table = pq.read_table(BytesIO(read_bytes(self.store, record, "rows.parquet")), columns=["ids", "first_supervised"])
        return list(zip(table["ids"].to_pylist(), table["first_supervised"].to_pylist(), strict=True))

    @cached_property
    def _stored_labels(self) -> dict[str, StoredLabels | None]:
        return {}

    def stored_labels(self, kind: str) -> StoredLabels | None:
        """Soft labels of a kind of policy: this recipe's, else the newest finished ones; None where there are none, or of schema 1."""
        if kind not in self._stored_labels:
            self._stored_labels[kind] = self._find_stored_labels(kind)
        return self._stored_labels[kind]

    def _find_stored_labels(self, kind: str) -> StoredLabels | None:
        for policy, teacher, curated in self._labelled(kind):
            snapshot = RowCache(self.store, "soft_labels", soft_label_namespace(policy, teacher)).snapshot()
            counts = [commit.num_tokens for commit in snapshot.commits if commit.num_tokens is not None]
            if sum(counts) and len(counts) == len(snapshot.commits):
                rows = sum(len(commit.keys) for commit in snapshot.commits)
                tokens = rows * curated.summary["tokens"] / curated.summary["rows"]
                columns = int(teacher.summary["teacher"]["num_columns"])
                groups = sum(len(commit.ranges) - 1 for commit in snapshot.commits)
                return StoredLabels(policy, columns, rows, tokens, sum(counts), groups, snapshot.size_bytes())
        return None

    def _labelled(self, kind: str) -> Iterator[tuple[SoftLabels, Record, Record]]:
        """(policy, teacher, curated rows) of tables of soft labels that may be there."""
        policy, teacher, curated = self.recipe.soft_labels, self.records["teacher"], self.records["curate"]
        if policy is not None and policy.kind == kind and teacher is not None and curated is not None:
            yield policy, teacher, curated
        for record in reversed(self.finished("soft_labels")):
            teacher, curated = (find(self.store, stage, record.upstream[stage]) for stage in ("teacher", "curate"))
            if record.identity["kind"] == kind and teacher is not None and curated is not None:
                yield _POLICY.validate_python(record.identity), teacher, curated

    def same_teacher(self, record: Record) -> bool:
        """Whether the teacher above a record is this recipe's, or of its size."""
        if record.upstream["teacher"] == self.nodes["teacher"].fingerprint:
            return True
        teacher = find(self.store, "teacher", record.upstream["teacher"])
        return teacher is not None and self.teacher_parameters is not None and teacher.summary["parameters"] == self.teacher_parameters

    def scored(self, record: Record) -> tuple[float, float] | None:
        """(tokens that the teacher read, seconds) of finished soft labels; None if their rows are gone."""
        curated, summary = find(self.store, "curate", record.upstream["curate"]), record.summary
        if curated is None:
            return None
        return curated.summary["tokens"] * summary["rows_computed"] / summary["rows"], summary["seconds"]

    def _scored_answers(self, namespace: str, held: Collection[str]) -> int:
        if self._answer_table is None or not self._answer_table[2]:
            return 0
        cache, snapshot, keys = self._answer_table
        rows = cache.read(snapshot, keys).to_pylist()
        scored = [soft_label_key(namespace, [*row["prompt_ids"], *row["answer_ids"]], len(row["prompt_ids"])) for row in rows]
        return sum(key in held for key in scored)

    # ------------------------------------------------------------------------------------------ models

    @cached_property
    def teacher_size(self) -> Size | None:
        """The teacher's parameters, from its architecture or its files' headers."""
        teacher = self.recipe.teacher
        if isinstance(teacher, TrainedTeacher):
            return llama_size(teacher.architecture, len(teacher.tokenizer.alphabet) + 2)
        return stored_size(teacher) if isinstance(teacher, PretrainedTeacher) else None

    @cached_property
    def teacher_parameters(self) -> int | None:
        """From the record, or from the size."""
        if (record := self.records["teacher"]) is not None:
            found: int | None = record.summary["parameters"]
            return found
        return None if self.teacher_size is None else self.teacher_size.parameters()

    @cached_property
    def num_columns(self) -> int | None:
        """Columns of the teacher's tokenizer; of a teacher on the hub None, until it was looked at."""
        teacher, record = self.recipe.teacher, self.records["teacher"]
        if isinstance(teacher, TrainedTeacher):
            return len(teacher.tokenizer.alphabet) + 2
        if isinstance(teacher, ServerTeacher):
            return None
        return stored_columns(teacher) if record is None else int(record.summary["teacher"]["num_columns"])

    @property
    def kept_tokens(self) -> int | None:
        """Tokens of a trimmed vocabulary; None before there is one."""
        record = self.records.get("vocabulary")
        return None if record is None else int(record.summary["tokens"])

    @cached_property
    def student_parameters(self) -> int | None:
        """Of the student and the models it is compared with, which are of one size.

        Raises:
            RecipeError: the teacher cannot be made into such a student.
        """
        student = self.recipe.student
        if isinstance(student, StudentFromConfig):
            columns = self.num_columns if student.vocabulary is None else self.kept_tokens
            return None if columns is None else llama_size(student.architecture, columns).parameters()
        if isinstance(student, PretrainedStudent):
            size = stored_size(student) if student.vocabulary is None else None
            return None if size is None else size.parameters()
        if self.teacher_size is None:
            return None
        try:
            blocks = student.kept_blocks(len(self.teacher_size.blocks))
        except ValueError as error:
            raise RecipeError(f"student.{error}") from error
        if student.narrower or student.num_kv_heads:
            from kd_core.student.describe import teacher_config  # with transformers: seconds that only such a recipe pays
            from kd_core.student.shrink import shrunk_config

            config = teacher_config(self.recipe)
            assert config is not None, "a server teacher has no size"
            shrunk_config(config, student)
        if student.narrower or student.num_kv_heads or student.share_embeddings or student.vocabulary:
            return None  # kd student describe counts these, from the config
        return self.teacher_size.parameters(blocks)

    def evaluated_parameters(self, model: str) -> int | None:
        """Of the model behind 'evaluate.<model>'."""
        if model == "champion":
            holder = champion(self.recipe, self.store, self.nodes)
            record = None if holder is None else find(self.store, holder.artifact.stage, holder.artifact.fingerprint)
            return None if record is None else int(record.summary["parameters"])
        return self.teacher_parameters if model == "teacher" else self.student_parameters


def _row_bytes(snapshot: Snapshot) -> float | None:
    rows = sum(len(commit.keys) for commit in snapshot.commits)
    groups = sum(max(1, len(commit.ranges) - 1) for commit in snapshot.commits)
    return max(0.0, snapshot.size_bytes() - GROUP_BYTES * groups) / rows if rows else None


def _sums(rows: Sequence[tuple[list[int], int]]) -> tuple[int, int]:
    """(tokens, supervised tokens) of rows of (ids, first supervised position)."""
    tokens = sum(len(ids) for ids, _ in rows)
    return tokens, tokens - sum(first for _, first in rows)


def _has_gold(source: Source) -> bool:
    return source.style == "running_totals" if source.kind == "reasoning_gym" else source.gold is not None


def _total(numbers: Iterable[int | None]) -> int | None:
    """The sum; None if one is unknown."""
    found = list(numbers)
    return None if any(n is None for n in found) else sum(n for n in found if n is not None)
