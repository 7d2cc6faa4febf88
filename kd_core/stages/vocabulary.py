"""The stage that finds what a student keeps of its tokenizer, from the rows and prompts of the recipe.

Test answers are not looked at: a student that meets one spells what it does not know in smaller tokens.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from kd_core.artifacts import find
from kd_core.errors import TeacherError
from kd_core.progress import Tick
from kd_core.recipe import PretrainedStudent, Recipe
from kd_core.stages.graph import build_graph
from kd_core.stages.job import Job
from kd_core.store import Store
from kd_core.student.vocabulary import kept_tokens, trim_tokenizer
from kd_core.summaries import VocabularySummary, of
from kd_core.teacher.models import load_tokenizer
from kd_core.tokens.encoding import encode_prompt, num_columns
from kd_core.tokens.token_map import TokenMap, write_token_map

__all__ = ["trimmed_tokens", "vocabulary_stage"]

_READ_ROWS = 1024


def vocabulary_stage(job: Job) -> VocabularySummary:
    """Files: tokenizer/, the trimmed one, with token_map.json.

    Raises:
        RecipeError: a tokenizer of a kind that cannot be trimmed.
        TeacherError: the trimmed tokenizer reads a text otherwise than the full one.
    """
    spec = job.recipe.student.vocabulary
    assert spec is not None, "a recipe that keeps all tokens has no such node"
    tokenizer = _full_tokenizer(job)
    counts_V = np.zeros(num_columns(tokenizer), np.int64)
    for found in _row_ids(job):
        counts_V += np.bincount(found, minlength=len(counts_V))
    num_texts = 0
    for _, ids in _texts(job, tokenizer):
        counts_V += np.bincount(np.array(ids, np.int64), minlength=len(counts_V))
        num_texts += 1
    seen = np.flatnonzero(counts_V)
    token_map = kept_tokens(tokenizer, seen.tolist(), num_common=spec.num_common)
    trimmed = trim_tokenizer(tokenizer, token_map)
    _expect_same_reading(job, tokenizer, trimmed, token_map)
    trimmed.save_pretrained(job.directory / "tokenizer")
    write_token_map(token_map, job.directory / "tokenizer")
    job.tick(Tick(num_texts, num_texts, "texts"))
    return VocabularySummary(len(token_map.kept), token_map.num_full, len(seen), num_texts)


def trimmed_tokens(recipe: Recipe, store: Store) -> int | None:
    """Number of tokens that the recipe's finished vocabulary keeps; None where there is none, or not yet."""
    node = build_graph(recipe, store).get("vocabulary")
    record = None if node is None else find(store, node.stage, node.fingerprint)
    return None if record is None else of(record, VocabularySummary).tokens


def _full_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """The one that the student would have."""
    if isinstance(job.recipe.student, PretrainedStudent):
        return load_tokenizer(job.recipe.student)
    with job.files(job.inputs["teacher"]) as files:
        return load_tokenizer(files / "model", trust_remote_code=job.recipe.trusts_code)


def _row_ids(job: Job) -> Iterator[np.ndarray]:
    """Ids of training and validation rows as they will be trained on: answers as they were sampled."""
    with job.files(job.inputs["curate"]) as files:
        for name in ("rows.parquet", "validation.parquet"):
            for batch in pq.ParquetFile(files / name).iter_batches(batch_size=_READ_ROWS, columns=["ids"]):
                yield batch["ids"].flatten().to_numpy()


def _texts(job: Job, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Read (text, its ids) of answers in rows, as the tokenizer would write them, and of all prompts of splits and suites."""
    with job.files(job.inputs["curate"]) as files:
        for name in ("rows.parquet", "validation.parquet"):
            for batch in pq.ParquetFile(files / name).iter_batches(batch_size=_READ_ROWS, columns=["text"]):
                texts = batch["text"].to_pylist()
                yield from zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)
    for file in job.inputs["prompts"].files:
        for prompt in job.read_table("prompts", file.name)["prompt"].to_pylist():
            yield prompt, encode_prompt(tokenizer, prompt, job.recipe.text_task)


def _expect_same_reading(job: Job, full: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, token_map: TokenMap) -> None:
    for (text, theirs), (_, ours) in zip(_texts(job, full), _texts(job, trimmed), strict=True):
        if token_map.restore(np.array(ours, np.int64)).tolist() != theirs:
            raise TeacherError(
                f"the trimmed tokenizer reads {text[:60]!r} as other tokens than the full one; please report it, and leave "
                "student.vocabulary out"
            )
