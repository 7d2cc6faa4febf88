"""A kind of task is handed to the stages: what they compute is what it says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_core.progress import silent
from kd_core.prompts import PromptSet
from kd_core.recipe import Recipe, SoftLabels, Task
from kd_core.recipe.files import load_recipe
from kd_core.softlabels.capture import Scores
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.summaries import CurateSummary, ScoringSummary, of
from kd_core.task_kinds import Curation, TaskModel, Workplace, kinds
from kd_core.task_kinds.generation import Generation
from kd_core.tokens.batches import TokenRow


class Halved(Task):
    """A task whose kind learns from every second row."""


class HalvedKind(Generation):
    """Text of which half is thrown away, and scored in an order of its own."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def collect(self, recipe: Recipe, directory: Path) -> PromptSet:
        self.asked.append("collect")
        return super().collect(recipe, directory)

    def curate(self, work: Workplace, answers: pa.Table | None) -> Curation:
        self.asked.append("curate")
        found = super().curate(work, answers)
        return replace(found, rows=found.rows[::2])

    def score(self, teacher: TaskModel, rows: Sequence[tuple[str, TokenRow]], policy: SoftLabels, *, micro_batch_tokens: int) -> Scores:
        self.asked.append("score")
        return super().score(teacher, rows, policy, micro_batch_tokens=micro_batch_tokens)

    def student(self, work: Workplace, seed: int) -> TaskModel:
        self.asked.append("student")
        return super().student(work, seed)

    def measure(self, *args: Any, **options: Any) -> Any:
        self.asked.append("measure")
        return super().measure(*args, **options)


def test_a_kind_of_one_s_own_is_what_the_stages_ask(small_recipe: Path, tmp_path: Path, monkeypatch) -> None:
    own = HalvedKind()
    monkeypatch.setitem(kinds(), Halved, own)
    given = load_recipe(small_recipe, ["seeds=[0]", "evaluation.compare=[]", "run.parallel=1"])
    rules = given.gate.model_copy(update={"rules": given.gate.rules[-1:]})
    given = given.model_copy(update={"gate": rules})
    recipes = {"as it is": given, "halved": given.model_copy(update={"task": Halved(**given.task.model_dump())})}
    rows = {}
    for name, recipe in recipes.items():
        store = LocalStore(tmp_path / name)
        nodes = build_graph(recipe, store)
        wanted = ("prompts", "teacher", "answers", "curate", "soft_labels", "student.0", "evaluate.student")
        for node in wanted:
            run_node(recipe, nodes, node, store=store, tick=silent, extra={})
        rows[name] = of(open_node(store, nodes["curate"]), CurateSummary).rows
        assert of(open_node(store, nodes["soft_labels"]), ScoringSummary).shards.rows == rows[name]
    assert list(dict.fromkeys(own.asked)) == ["collect", "curate", "score", "student", "measure"]
    assert rows["halved"] == -(-rows["as it is"] // 2)
