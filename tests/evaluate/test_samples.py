"""Answers for the report alone: a few, greedy, short, and no score is touched."""

from pathlib import Path

import pyarrow as pa
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kd_core.evaluate.samples import with_samples
from kd_core.evaluate.statistics import SCORE_SCHEMA
from kd_core.prompts.rows import PROMPT_SCHEMA
from kd_core.recipe import Task
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore
from kd_core.teacher.models import LoadedModel

TASK = Task(template="plain", verifier="math")


QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def items(number, prefix=""):
    rows = [
        {"prompt_id": f"{prefix}{i}", "prompt": f"{i}+1=", "gold": f"{i + 1}", "reference": None, "split": "test", "source": "s"}
        for i in range(number)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def scores(suites):
    rows = [
        {"suite": suite, "item_id": item_id, "seed": 3, "nll_sum": float(i), "tokens": 1}
        for suite, table in suites.items()
        for i, item_id in enumerate(table["prompt_id"].to_pylist())
    ]
    return pa.Table.from_pylist([{name: row.get(name) for name in SCORE_SCHEMA.names} for row in rows], schema=SCORE_SCHEMA)


def test_the_first_items_of_all_suites_share_five_answers_and_scores_stay(tiny_model):
    suites = {"a": items(7), "b": items(7, "b")}
    before = scores(suites)
    after = with_samples(before, tiny_model(), suites, TASK)
    assert [(row["suite"], row["item_id"]) for row in after.to_pylist() if row["text"] is not None] == [
        *(("a", "0"), ("a", "1"), ("b", "b0"), ("b", "b1"))
    ]
    assert after.drop(["text"]).equals(before.drop(["text"]))
    assert after.schema == SCORE_SCHEMA
    assert after.equals(with_samples(before, tiny_model(), suites, TASK))
    alone = with_samples(scores({"a": items(7)}), tiny_model(), {"a": items(7)}, TASK)
    assert sum(text is not None for text in alone["text"].to_pylist()) == 5


def test_an_answer_ends_where_the_models_positions_end(tiny_model):
    tokenizer = tiny_model().tokenizer
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_positions=6, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    loaded = LoadedModel(GPT2LMHeadModel(config).eval(), tokenizer, 17)
    table = pa.concat_tables([items(2), items(1, "long").set_column(1, PROMPT_SCHEMA.field(1), pa.array(["1+2+3+4="]))])
    texts = with_samples(scores({"a": table}), loaded, {"a": table}, TASK)["text"].to_pylist()
    assert texts[2] is None, "its prompt leaves no room"
    assert all(text is not None and len(text) <= 2 for text in texts[:2])


def test_they_are_part_of_the_identity_of_evaluations_that_make_them(tmp_path):
    rules = "gate.rules=[{kind: ceiling, metric: parameter_ratio, maximum: 1}]"
    for overrides, expected in ((), None), (("evaluation.generate=null", rules), {"prompts": 5, "max_tokens": 128}):
        nodes = build_graph(load_recipe(QUICKSTART, overrides), LocalStore(tmp_path / "store"))
        assert nodes["evaluate.student"].identity["evaluation"].get("samples") == expected
