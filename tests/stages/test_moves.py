"""The reference names, for every field in every place, where a change begins to compute anew."""

from pathlib import Path

import pytest

from kd_core.recipe.reference import Moves, recipe_reference
from kd_core.recipe.schema import recipe_schema
from kd_core.stages.moves import field_moves

COMMITTED = Path(__file__).parents[2] / "docs" / "recipe.md"


@pytest.fixture(scope="module")
def moves() -> Moves:
    return field_moves()


def test_the_committed_reference_is_fresh(moves: Moves) -> None:
    assert COMMITTED.read_text() == recipe_reference(moves), "write it anew: kd schema --markdown > docs/recipe.md"


def test_every_field_of_every_type_was_changed(moves: Moves) -> None:
    """A new kind of source, teacher, student or task is there by itself."""
    changed = {(model, name) for _, model, name in moves}
    schema = recipe_schema()
    parts = {"Recipe": schema, **schema["$defs"]}
    fields = {(part, name) for part, value in parts.items() for name, field in value.get("properties", {}).items() if "const" not in field}
    with_parts = {(part, name) for part, name in fields if "$ref" in str(parts[part]["properties"][name])}
    assert fields - with_parts - changed == set()
    assert len(changed) >= 120


@pytest.mark.parametrize(
    ("field", "first"),
    [
        (("", "Recipe", "description"), {"report"}),
        (("", "Recipe", "seeds"), {"training"}),
        (("prompts.sources", "FileSource", "gold"), {"prompts"}),
        (("teacher.sources", "DatasetSource", "limit"), {"teacher"}),
        (("evaluation.suites.source", "ReasoningGymSource", "seed"), {"prompts"}),
        (("teacher", "ServerTeacher", "price_per_million_tokens"), {"report"}),
        (("teacher.training", "Training", "steps"), {"teacher"}),
        (("training", "StudentTraining", "epochs"), {"training"}),
        (("training", "StudentTraining", "least_rows_share"), {"report"}),
        (("task", "Task", "verifier"), {"curate", "evaluate"}),
        (("answers", "Answers", "max_tokens"), {"answers"}),
        (("evaluation.generate", "Answers", "max_tokens"), {"evaluate"}),
        (("curate", "Curate", "gold_rows"), {"curate"}),
        (("soft_labels", "TopK", "k"), {"soft_labels"}),
        (("objective.temperature", "Constant", "value"), {"student"}),
        (("student.vocabulary", "Vocabulary", "num_common"), {"vocabulary"}),
        (("gate.rules", "Floor", "minimum"), {"gate"}),
        (("run", "Run", "threads"), set()),
        (("run", "Run", "tracking"), {"publish"}),
    ],
)
def test_a_change_begins_where_the_graph_says(moves: Moves, field: tuple[str, str, str], first: set[str]) -> None:
    assert moves[field] == first
