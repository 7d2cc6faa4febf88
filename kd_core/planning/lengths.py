"""Expected lengths of a recipe's texts, in tokens.

Records are believed first, then the sources. Texts that nobody has read are assumed to be of common lengths, and
``assumed`` says so.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from statistics import fmean

from kd_core.planning.basis import Basis
from kd_core.planning.cached import Cached
from kd_core.planning.counts import Counts, has_gold
from kd_core.prompts.sources import read_source
from kd_core.recipe import DatasetSource, TrainedTeacher
from kd_core.summaries import AnswersSummary, CurateSummary, of

__all__ = ["Lengths"]

_CHARACTERS_PER_TOKEN = 4.0  # of common sub-word tokenizers on English text
_UNREAD_CHARACTERS = {"prompt": 240.0, "gold": 400.0}  # between GSM8K (235 and 290) and MATH (200 and 550)
_SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of prompts, answers and rows."""

    basis: Basis
    counts: Counts
    cached: Cached

    def tokens_of(self, characters: float | None) -> float | None:
        """Number of tokens of a text: one a character for a character tokenizer, else four characters a token."""
        if characters is None or isinstance(self.basis.recipe.teacher, TrainedTeacher):
            return characters
        return characters / _CHARACTERS_PER_TOKEN

    @cached_property
    def prompt_tokens(self) -> float | None:
        """Mean length of a prompt."""
        return self.tokens_of(_UNREAD_CHARACTERS["prompt"] if self.assumed else self.counts.prompts.mean_characters("prompt"))

    @cached_property
    def gold_tokens(self) -> float | None:
        """Mean length of a worked gold answer, with its end token; None where there are none."""
        characters = self.counts.prompts.mean_characters("gold")
        if self.assumed and any(has_gold(source) for source in self.basis.recipe.prompts.sources):
            characters = _UNREAD_CHARACTERS["gold"]
        tokens = self.tokens_of(characters)
        return None if tokens is None else tokens + 1.0

    @property
    def assumed(self) -> bool:
        """Tell whether no prompt has been read, so that lengths of prompts and gold answers are mere assumptions."""
        return self.counts.prompts.table is None

    def answer_tokens(self, max_tokens: int) -> float:
        """Expected length of a generated answer: of this teacher's answers, else of gold ones if they were read, at most the bound."""
        gold = None if self.assumed else self.gold_tokens
        return min(float(max_tokens), self._answered_tokens or gold or float(max_tokens))

    @cached_property
    def _answered_tokens(self) -> float | None:
        """Mean length of an answer in the newest finished record of the same row store."""
        namespace = self.cached.answer_namespace
        found = [of(record, AnswersSummary) for record in self.basis.finished("answers")]
        alike = [answers for answers in found if answers.shards.namespace == namespace]
        return alike[-1].tokens / alike[-1].shards.rows if alike else None

    @cached_property
    def row_tokens(self) -> tuple[float, float] | None:
        """Mean (tokens, supervised tokens) of a row the student learns from."""
        record = self.basis.records["curate"]
        if record is not None:
            learnt = of(record, CurateSummary)
            return learnt.tokens / learnt.rows, learnt.supervised_tokens / learnt.rows
        answers = self.basis.recipe.answers
        supervised = self.gold_tokens if answers is None else self.answer_tokens(answers.max_tokens)
        if self.prompt_tokens is None or supervised is None:
            return None
        return self.prompt_tokens + supervised, supervised

    @cached_property
    def teacher_row_tokens(self) -> float | None:
        """Mean length of a row that a trained teacher learns from, over the first rows of each source."""
        teacher = self.basis.recipe.teacher
        if not isinstance(teacher, TrainedTeacher) or any(isinstance(source, DatasetSource) for source in teacher.sources):
            return None
        lengths = [
            row.prompt_characters + len(row.gold) + 1.0
            for i, source in enumerate(teacher.sources)
            for _, row in islice(read_source(source, where=f"teacher.sources.{i}", s3=self.basis.recipe.run.s3), _SAMPLE_ROWS)
            if row.prompt and row.gold
        ]
        return fmean(lengths) if lengths else None
