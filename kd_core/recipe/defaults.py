"""What a recipe need not say: fields that are filled in from the others, once, before the recipe is checked.

Works on plain data. What is written stays as it is, a written null too. The filled-in recipe is whole: it is the same as one that states
these values, with the same fingerprints. Fields with a default of their own in the recipe's types are not touched here.

Rules are asked in order, so a later one may read what an earlier one has filled in.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

from pydantic import BaseModel

__all__ = ["fill_in", "filled_in"]

_SMALL_ALPHABET = 256
"""A tokenizer of at most so many characters makes all log-probabilities cost less than ids of some."""
_WIDEST = 1 << 20
_OWN_KINDS = ("pretrained", "from_teacher")
"""Students that begin with weights that know something; all others begin with random ones."""


def fill_in(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe with those that it leaves out.

    Data that is no valid recipe passes through: whoever checks it says what is wrong.

    >>> recipe = fill_in({"name": "mine", "teacher": {"kind": "server"}})
    >>> recipe["seeds"], recipe["soft_labels"], recipe["objective"], recipe["publish"]
    ([0, 1, 2], None, {'supervision': 'hard'}, 'mine')
    """
    recipe = dict(data)
    rules = {**_RULES, **_CLASS_RULES} if _at(recipe, "task", "kind") == "classification" else _RULES
    for name, rule in rules.items():
        if (value := rule(recipe)) is not _ABSENT:
            recipe[name] = value
    return recipe


def filled_in(data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted path -> value of everything that ``fill_in`` adds.

    >>> filled_in({"name": "mine"})["publish"]
    'mine'
    """
    whole = fill_in(data)
    return _added(data, {name: whole[name] for name in _RULES if name in whole}, "")


def _added(before: Mapping[str, Any], after: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in after.items():
        if name not in before:
            found[f"{path}{name}"] = value
        elif isinstance(value, Mapping) and isinstance(before[name], Mapping):
            found |= _added(before[name], value, f"{path}{name}.")
    return found


# ---------------------------------------------------------------------------------------------- reading what is there

_ABSENT: Any = object()


def _at(data: Any, *path: str, default: Any = None) -> Any:
    """A field of plain data or of a model, or the default where there is none."""
    for name in path:
        if isinstance(data, Mapping):
            data = data.get(name, _ABSENT)
        else:
            data = getattr(data, name, _ABSENT) if isinstance(data, BaseModel) else _ABSENT
        if data is _ABSENT:
            return default
    return data


def _items(data: Any) -> Sequence[Any]:
    return data if isinstance(data, list | tuple) else ()


def _with(given: Any, defaults: Mapping[str, Any]) -> Any:
    """What is given, with defaults where it says nothing."""
    if given is _ABSENT:
        return dict(defaults)
    return {**given, **{k: v for k, v in defaults.items() if k not in given}} if isinstance(given, Mapping) else given


def _is_server(recipe: Mapping[str, Any]) -> bool:
    return bool(_at(recipe, "teacher", "kind") == "server")


def _is_generated(source: Any) -> bool:
    return bool(_at(source, "kind") == "reasoning_gym")


def _has_gold(recipe: Mapping[str, Any]) -> bool:
    """Whether a source has worked gold answers, of which some are learnt from."""

    def worked(source: Any) -> bool:
        told = _at(source, "gold") is not None or _at(source, "messages") is not None
        return told or (_is_generated(source) and _at(source, "style") == "running_totals")

    sources = _items(_at(recipe, "prompts", "sources"))
    return _at(recipe, "curate", "gold_rows") != 0 and any(map(worked, sources))


def _has_final_answers(recipe: Mapping[str, Any], *, suites: bool = False) -> bool:
    """Whether something says what a final answer is, so that one can be right or wrong: without, gold is text of any length."""
    sources = [*_items(_at(recipe, "prompts", "sources"))]
    if suites:
        sources += [_at(suite, "source") for suite in _items(_at(recipe, "evaluation", "suites"))]
    told = (_is_generated(source) or _at(source, "reference") is not None for source in sources)
    return _at(recipe, "task", "answer_marker") is not None or any(told)


# ---------------------------------------------------------------------------------------------- one rule a field


def _task(recipe: Mapping[str, Any]) -> Any:
    rules = {"template": "plain" if _at(recipe, "teacher", "kind") == "trained" else "chat"}
    if not _has_final_answers(recipe, suites=True):
        rules["verifier"] = "exact"  # nothing is verified
    return _with(recipe.get("task", _ABSENT), rules)


def _prompts(recipe: Mapping[str, Any]) -> Any:
    given, suites = recipe.get("prompts", _ABSENT), _at(recipe, "evaluation", "suites")
    held_out = suites is None or any(_at(suite, "kind") == "held_out" for suite in _items(suites))
    if not isinstance(given, Mapping):
        return given
    return {**given, "split": _with(given.get("split", _ABSENT), {"validation": 0.05, "test": 0.1 if held_out else 0.0})}


def _answers(recipe: Mapping[str, Any]) -> Any:
    kind, given = _at(recipe, "teacher", "kind"), recipe.get("answers", _ABSENT)
    longest = 512 if kind == "server" else 256
    if isinstance(positions := _at(recipe, "teacher", "architecture", "max_positions"), int):
        longest = min(longest, max(1, positions // 2))
    temperature = _at(given, "temperature", default=0.7)
    num_samples = 4 if kind == "server" and temperature != 0 else 1
    return _with(given, {"num_samples": num_samples, "temperature": 0.7, "max_tokens": longest})


def _curate(recipe: Mapping[str, Any]) -> Any:
    given = recipe.get("curate", _ABSENT)
    if not _has_final_answers(recipe):  # else each answer would be wrong that is not the gold text word for word
        return _with(given, {"verify": False, "keep_unverified": True})
    return given


def _wants_soft(recipe: Mapping[str, Any]) -> bool:
    supervision = _at(recipe, "objective", "supervision")
    if supervision is not None:
        return bool(supervision == "soft")
    return not _is_server(recipe) and recipe.get("soft_labels", _ABSENT) is not None


def _temperatures(recipe: Mapping[str, Any]) -> list[Any]:
    """Temperatures that the objective names, or else the soft labels, or else 1."""
    wanted, stored = _at(recipe, "objective", "temperature"), _at(recipe, "soft_labels")
    places = [wanted, *(_at(wanted, name) for name in ("value", "start", "end")), *_items(_at(wanted, "values"))]
    if not (found := [place for place in places if isinstance(place, int | float)]):
        found = [number for number in (_at(stored, "temperature"), *_items(_at(stored, "temperatures"))) if isinstance(number, int | float)]
    return list(dict.fromkeys(found)) or [1.0]


def _soft_labels(recipe: Mapping[str, Any]) -> Any:
    given, temperatures = recipe.get("soft_labels", _ABSENT), _temperatures(recipe)
    if given is _ABSENT:
        alphabet = _at(recipe, "teacher", "tokenizer", "alphabet")
        divergence = _at(recipe, "objective", "divergence", default="forward_kl")
        if not _wants_soft(recipe):
            return None
        if isinstance(alphabet, str) and len(alphabet) <= _SMALL_ALPHABET:
            return {"kind": "dense"}
        linear = _at(divergence, "kind", default=divergence) == "forward_kl"
        given = {"kind": "sampled" if linear and len(temperatures) == 1 else "topk"}
    match _at(given, "kind"):
        case "sampled":
            return _with(given, {"num_draws": 25, "temperature": temperatures[0]})
        case "topk":
            return _with(given, {"k": 64, "temperatures": temperatures})
    return given


def _objective(recipe: Mapping[str, Any]) -> Any:
    if not _wants_soft(recipe):
        return _with(recipe.get("objective", _ABSENT), {"supervision": "hard"})
    rules = {"supervision": "soft", "hard_weight": 0.1, "soft_weight": 0.9, "temperature": _temperatures(recipe)[0]}
    return _with(recipe.get("objective", _ABSENT), rules)


def _training(recipe: Mapping[str, Any]) -> Any:
    given, kind = recipe.get("training", _ABSENT), _at(recipe, "student", "kind")
    rules: dict[str, Any] = {}
    if _at(given, "steps") is None and _at(given, "epochs") is None:
        rules |= {"epochs": 3.0, "least_steps": 50} if kind in _OWN_KINDS else {"epochs": 10.0, "least_steps": 500}
    if _at(given, "warmup_steps") is None:
        rules |= {"warmup_share": 0.05}
    rules |= {"batch_rows": 16 if kind in _OWN_KINDS else 32, "learning_rate": _learning_rate(recipe)}
    return _with(given, rules)


def _learning_rate(recipe: Mapping[str, Any]) -> float:
    """What knows something already moves little; a new model as much as its width allows."""
    if _at(recipe, "student", "adapter") is not None:
        return 2e-4
    match _at(recipe, "student", "kind"):
        case "pretrained":
            return 5e-5
        case "from_teacher":
            return 2e-4
    width = _at(recipe, "student", "architecture", "hidden_size", default=_at(recipe, "student", "config", "hidden_size"))
    return float(f"{0.024 / sqrt(width if isinstance(width, int) and 64 <= width <= _WIDEST else 64):.2g}")


def _evaluation(recipe: Mapping[str, Any]) -> Any:
    given = recipe.get("evaluation", _ABSENT)
    generate = _at(given, "generate", default=_ABSENT)
    if generate is not _ABSENT or _has_final_answers(recipe, suites=True):
        many = _at(generate, "num_samples", default=1) != 1
        longest = _at(recipe, "answers", "max_tokens", default=_answers({**recipe, "answers": {}})["max_tokens"])
        generate = _with(generate, {"num_samples": 1, "temperature": 0.7 if many else 0.0, "max_tokens": longest})
    else:
        generate = None
    compare = [] if _is_server(recipe) else ["teacher"]
    if _has_gold(recipe):
        compare.append("baseline")
    elif _at(recipe, "objective", "supervision") == "soft":
        compare.append("ablation_hard")
    if isinstance(given, Mapping) and "generate" in given:
        given = {**given, "generate": generate}
    return _with(given, {"suites": [{"kind": "held_out", "name": "held_out"}], "generate": generate, "compare": compare})


def _gate(recipe: Mapping[str, Any]) -> Any:
    metric = "nll" if _at(recipe, "evaluation", "generate") is None else "pass_at_1"
    compare = _items(_at(recipe, "evaluation", "compare"))
    other = next((name for name in ("baseline", "ablation_hard") if name in compare), None)
    rules: list[dict[str, Any]] = []
    if other is not None and len(_items(recipe["seeds"])) > 1:
        rules.append({"kind": "better_than", "metric": metric, "than": other})
    rules.append({"kind": "not_worse_than_champion", "metric": metric, "margin": 0.02})
    if not _is_server(recipe):
        rules.append({"kind": "ceiling", "metric": "parameter_ratio", "maximum": 1.0})
    return _with(recipe.get("gate", _ABSENT), {"rules": rules})


_RULES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "seeds": lambda recipe: recipe.get("seeds", [0, 1, 2]),
    "task": _task,
    "prompts": _prompts,
    "answers": _answers,
    "curate": _curate,
    "soft_labels": _soft_labels,
    "objective": _objective,
    "training": _training,
    "evaluation": _evaluation,
    "gate": _gate,
    "publish": lambda recipe: recipe.get("publish", recipe.get("name", "unnamed")),
}


# ---------------------------------------------------------------------------------------------- classes


def _class_soft_labels(recipe: Mapping[str, Any]) -> Any:
    return recipe.get("soft_labels", {"kind": "dense"} if _wants_soft(recipe) else None)


def _class_objective(recipe: Mapping[str, Any]) -> Any:
    if not _wants_soft(recipe):
        return _with(recipe.get("objective", _ABSENT), {"supervision": "hard"})
    rules = {"supervision": "soft", "hard_weight": 0.1, "soft_weight": 0.9, "temperature": _CLASS_TEMPERATURE}
    return _with(recipe.get("objective", _ABSENT), rules)


def _class_evaluation(recipe: Mapping[str, Any]) -> Any:
    compare = ["teacher", *(["ablation_hard"] if _at(recipe, "objective", "supervision") == "soft" else [])]
    rules = {"suites": [{"kind": "held_out", "name": "held_out"}], "generate": None, "compare": compare}
    return _with(recipe.get("evaluation", _ABSENT), rules)


def _class_gate(recipe: Mapping[str, Any]) -> Any:
    rules = [
        {"kind": "not_worse_than_champion", "metric": "accuracy", "margin": 0.02},
        {"kind": "ceiling", "metric": "parameter_ratio", "maximum": 1.0},
    ]
    return _with(recipe.get("gate", _ABSENT), {"rules": rules})


_CLASS_TEMPERATURE = 4.0
"""At 1 a good classifier's other classes have hardly any probability, and their likeness is what is to be learnt."""

_CLASS_RULES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "task": lambda recipe: recipe["task"],
    "answers": lambda recipe: recipe.get("answers"),
    "curate": lambda recipe: recipe.get("curate", _ABSENT),
    "soft_labels": _class_soft_labels,
    "objective": _class_objective,
    "evaluation": _class_evaluation,
    "gate": _class_gate,
}
"""Rules that differ where classes are told apart."""
