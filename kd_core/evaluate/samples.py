"""A few greedy answers for the report of a recipe that scores none: a reader wants to see what a model says, and no score rests on it.

They are part of the identity of the evaluations that make them. Importable without torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from kd_core.fingerprint import fingerprint
from kd_core.recipe import Answers, Recipe, Task

if TYPE_CHECKING:
    from kd_core.teacher.models import LoadedModel

__all__ = ["samples_identity", "with_samples"]

_PROMPTS, _MAX_TOKENS = 5, 128


def samples_identity(recipe: Recipe) -> dict[str, int] | None:
    """Say what is answered for the report alone; None where the recipe scores answers, some of which the report shows."""
    return {"prompts": _PROMPTS, "max_tokens": _MAX_TOKENS} if recipe.evaluation.generate is None else None


def with_samples(scores: pa.Table, loaded: "LoadedModel", suites: Mapping[str, pa.Table], task: Task) -> pa.Table:
    """Fill in greedy answers to the first items, 5 of all suites together; every score stays as it is.

    Args:
        scores: of one model, SCORE_SCHEMA, without texts.
        loaded: the model; an answer ends at 128 tokens or at its last position.
        suites: name -> items (PROMPT_SCHEMA), as they were measured.
        task: template and answer form.
    """
    texts: dict[tuple[str, str], str] = {}
    number = max(1, _PROMPTS // len(suites))
    for suite, items in list(suites.items())[:_PROMPTS]:
        for item_id, text in _greedy(loaded, items.slice(0, number), task).items():
            texts[suite, item_id] = text
    names = zip(scores["suite"].to_pylist(), scores["item_id"].to_pylist(), strict=True)
    column = pa.array([texts.get(name) for name in names], pa.string())
    return scores.set_column(scores.schema.get_field_index("text"), scores.schema.field("text"), column)


def _greedy(loaded: "LoadedModel", items: pa.Table, task: Task) -> dict[str, str]:
    """The greedy answer to each item whose prompt leaves room for one, by item."""
    from kd_core.teacher.generate import generate
    from kd_core.tokens.encoding import decode_answer, encode_prompt

    prompts = {item["prompt_id"]: encode_prompt(loaded.tokenizer, item["prompt"], task) for item in items.to_pylist()}
    if loaded.max_positions is not None:
        prompts = {item_id: ids for item_id, ids in prompts.items() if len(ids) < loaded.max_positions}
    if not prompts:
        return {}
    room = _MAX_TOKENS if loaded.max_positions is None else loaded.max_positions - max(map(len, prompts.values()))
    answers = Answers(num_samples=1, temperature=0.0, max_tokens=min(_MAX_TOKENS, room))
    made = generate(loaded, list(prompts.values()), keys=[fingerprint(item_id) for item_id in prompts], answers=answers)
    return {
        item_id: decode_answer(loaded.tokenizer, answer.ids, prompt_ids=ids)
        for (item_id, ids), answer in zip(prompts.items(), made, strict=True)
    }
