"""The example of docs/library.md, run as it stands there on two models made from a config; and what it costs the second time."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core import library
from kd_core.errors import SoftLabelError
from kd_core.fingerprint import fingerprint
from kd_core.library import distillation_loss, scored_rows
from kd_core.losses import StepWeights
from kd_core.recipe import Dense, PretrainedTeacher, Run, Sampled
from kd_core.rows.keys import about_soft_labels
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.teacher.models import load_model, load_tokenizer, teacher_identity
from kd_core.teacher.reference import reference_identity
from kd_core.tokens.batches import TokenRow

TEXT = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
[EXAMPLE] = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
PAIRS = [(f"{a}+{b}=", f"{a + b}") for a in range(8) for b in range(8)]
TEACHER = PretrainedTeacher(kind="pretrained", model="models/teacher")
POLICY = Sampled(kind="sampled", num_draws=25, temperature=1.0)


@pytest.fixture
def models(tiny_model, tmp_path, monkeypatch) -> None:
    """models/teacher and models/student in an empty directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("teacher", "student")):
        made = tiny_model(seed=seed)
        made.model.save_pretrained(f"models/{name}")
        made.tokenizer.save_pretrained(f"models/{name}")


def run_example() -> dict[str, Any]:
    namespace: dict[str, Any] = {"pairs": PAIRS}
    exec(compile(EXAMPLE, "docs/library.md", "exec"), namespace)
    return namespace


def test_the_example_teaches_the_student_what_the_teacher_says(models, monkeypatch):
    done = run_example()
    labels, student = done["labels"], done["student"]
    assert len(labels) == len(PAIRS)

    def distance(model: Any) -> float:
        with torch.no_grad():
            return float(distillation_loss(model, *labels.batch(range(len(labels))), StepWeights(hard=0.0, soft=1.0, temperature=1.0)))

    assert distance(student) < 0.5 * distance(type(student).from_pretrained("models/student"))
    monkeypatch.setattr(library, "load_model", lambda *_, **__: pytest.fail("the teacher was loaded again"))
    again = run_example()
    assert torch.equal(again["targets"].ids_E, done["targets"].ids_E)


@pytest.mark.parametrize("weights", [StepWeights(hard=0.0, soft=1.0, temperature=2.0), StepWeights(hard=1.0, soft=0.0, temperature=1.0)])
def test_the_loss_is_a_mean_over_supervised_tokens_and_the_teacher_is_its_own_best_student(models, weights):
    rows = [TokenRow((3, 4, 5, 1), 2), TokenRow((6, 7, 8, 9, 10, 1), 3)]
    labels = scored_rows(TEACHER, rows, Dense(kind="dense"), Run(store="labels"))
    teacher = load_model(TEACHER, device=torch.device("cpu"), tokenizer=load_tokenizer(TEACHER)).model
    padded = float(distillation_loss(teacher, *labels.batch([0, 1]), weights))
    alone = [float(distillation_loss(teacher, *labels.batch([i]), weights)) for i in range(2)]
    assert padded == pytest.approx((2 * alone[0] + 3 * alone[1]) / 5, abs=1e-5)
    assert (abs(padded) < 1e-4) == (weights.hard == 0.0)


def test_labels_lie_where_a_recipe_with_this_teacher_looks_for_them(models):
    rows = [TokenRow((3, 4, 5, 1), 2), TokenRow((6, 7, 1), 1)]
    labels = scored_rows(TEACHER, rows, POLICY, Run(store="labels"))
    loaded = load_model(TEACHER, device=torch.device("cpu"), tokenizer=load_tokenizer(TEACHER))
    namespace = fingerprint(about_soft_labels(POLICY, teacher_identity(loaded, reference_identity(TEACHER))))
    assert Path("labels/rows/soft_labels", namespace, "about.json").is_file()
    keyed = [(row_key(namespace, row), row) for row in rows]
    live = score_rows(loaded, keyed, policy=POLICY, micro_batch_tokens=64).scored
    for number, scored in enumerate(live):
        batch, stored = labels.batch([number])
        assert batch.labels_N.tolist() == list(rows[number].ids[rows[number].first_supervised :])
        assert sorted(stored.ids_E.tolist()) == sorted(scored.targets.ids_E.tolist())


def test_new_rows_alone_are_scored(models, monkeypatch):
    rows = [TokenRow((3, 4, 5, 1), 2), TokenRow((6, 7, 1), 1)]
    scored_rows(TEACHER, rows[:1], POLICY, Run(store="labels"))
    asked = list[int]()
    real = library.score_rows
    monkeypatch.setattr(library, "score_rows", lambda loaded, shard, **options: asked.append(len(shard)) or real(loaded, shard, **options))
    assert len(scored_rows(TEACHER, [*rows, rows[0]], POLICY, Run(store="labels"))) == 3
    assert asked == [1]


def test_a_row_that_cannot_be_scored_is_named(models):
    rows = [TokenRow((3, 4, 1), 1), TokenRow((3,) * 4000, 1)]
    with pytest.raises(SoftLabelError, match="row 1 cannot be scored"):
        scored_rows(TEACHER, rows, POLICY, Run(store="labels"))
