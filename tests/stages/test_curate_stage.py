"""The curate stage: token ids of every kept row, from answers that carry ids and from answers that are text only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_core.artifacts import Record, publish
from kd_core.errors import TrainingError
from kd_core.progress import silent
from kd_core.prompts import PROMPT_SCHEMA
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.rows.schemas import ANSWER_SCHEMA
from kd_core.rows.table import RowCache
from kd_core.stages.curate import curate_stage
from kd_core.stages.graph import Node
from kd_core.stages.job import Job
from kd_core.store import LocalStore
from kd_core.summaries import Summary, plain
from kd_core.tokens.encoding import character_tokenizer
from tests.standins import SHARDS, SUMMARIES

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
EOS = 1
PROMPTS = [
    {"prompt_id": "a", "prompt": "1+2=", "gold": "1+2=3#3", "reference": "3", "split": "train", "source": "file:x"},
    {"prompt_id": "b", "prompt": "2+2=", "gold": None, "reference": "4", "split": "train", "source": "file:x"},
]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def answer(prompt_id: str, text: str, reason: str, ids: list[int], prompt_ids: list[int]) -> dict[str, Any]:
    key = f"{prompt_id}-{text}-{reason}"
    said = {"answer_ids": ids, "prompt_ids": prompt_ids, "text": text, "finish_reason": reason, "error": None}
    return {"key": key, "prompt_id": prompt_id, "sample_index": 0, **said}


@pytest.fixture
def curate(tmp_path: Path):
    """Runs the stage over given answers; returns kept rows as (prompt_id, source, ids, first_supervised)."""
    store = LocalStore(tmp_path / "store")

    def record(stage: str, fill, summary: Summary) -> Record:
        directory = tmp_path / stage
        directory.mkdir()
        fill(directory)
        return publish(store, directory, stage=stage, fp="f" * 32, identity={}, upstream={}, summary=plain(summary))

    def run(what: Recipe, answers: list[dict[str, Any]]) -> list[tuple[str, str, list[int], int]]:
        cache = RowCache(store, "answers", "n" * 32)
        commit = cache.commit(pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA), num_tokens=0)
        tokenizer = character_tokenizer(recipe().teacher.tokenizer)
        tokenizer.save_pretrained(tmp_path / "student")
        keys = pa.table({"key": [row["key"] for row in answers]})
        frozen = replace(SHARDS, namespace=cache.namespace, commits=(commit.sha256,))
        inputs = {
            "prompts": record(
                "prompts",
                lambda d: pq.write_table(pa.Table.from_pylist(PROMPTS, schema=PROMPT_SCHEMA), d / "prompts.parquet"),
                SUMMARIES["prompts"],
            ),
            "answers": record("answers", lambda d: pq.write_table(keys, d / "keys.parquet"), replace(SUMMARIES["answers"], shards=frozen)),
            "teacher": record("teacher", lambda d: tokenizer.save_pretrained(d / "model"), SUMMARIES["teacher"]),
        }
        out = tmp_path / "out"
        out.mkdir()
        curate_stage(Job(what, Node("curate", "curate", "curate", {}, {}, {}, "c" * 32), store, inputs, out, silent))
        rows = pq.read_table(out / "rows.parquet").to_pylist()
        return [(row["prompt_id"], row["source"], row["ids"], row["first_supervised"]) for row in rows]

    return run


def test_sampled_ids_are_taken_as_they_are(curate) -> None:
    """Trap 14: the ids below are no tokenisation of the text, and they are what the student gets."""
    rows = curate(
        recipe(*NO_GOLD),
        [answer("b", "2+2=4#4", "stop", [9, 9, EOS], [4, 12, 4, 14])],
    )
    assert rows == [("b", "teacher", [4, 12, 4, 14, 9, 9, EOS], 4)]


RULES = "gate.rules=[{kind: ceiling, metric: parameters, maximum: 1000000}]"
NO_GOLD = ("curate.gold_rows=0", "evaluation.compare=[teacher]", RULES)
SERVER = (
    "teacher={kind: server, model: m, revision: r}",
    "soft_labels=null",
    "objective={supervision: hard}",
    "evaluation.compare=[]",
    RULES,
    "curate={keep_truncated: true, verify: false}",
)


@pytest.mark.parametrize(("reason", "end"), [("stop", [EOS]), ("length", [])])
def test_text_answers_end_only_where_they_ended(curate, tmp_path: Path, reason: str, end: list[int]) -> None:
    """Trap 5: an answer that was cut off must not be taught as complete, whoever made the ids."""
    student = f"student={{kind: pretrained, model: {tmp_path / 'student'}}}"
    rows = curate(recipe(*SERVER, student), [answer("b", "2+2=", reason, [], [])])
    assert rows == [
        ("b", "teacher", [4, 12, 4, 14, 4, 12, 4, 14, *end], 4),
        ("a", "gold", [3, 12, 4, 14, 3, 12, 4, 14, 5, 16, 5, EOS], 4),
    ]


def test_nothing_to_learn_from_ends_with_the_counts(curate) -> None:
    no_gold = recipe(*NO_GOLD)
    with pytest.raises(TrainingError, match=r"curate: no row is left to learn from: \{.*'wrong': 1"):
        curate(no_gold, [answer("b", "2+2=5#5", "stop", [9, EOS], [4, 12, 4, 14])])
