"""Recipes from YAML, overrides, and errors as one clear line with the path in the YAML.

Owns everything between a file's bytes and a valid ``Recipe``; `core_yaml` reads the YAML. It refuses unknown keys and says
where: ``recipes/quickstart.yaml:27: student.architecture.num_head: unknown field; did you mean 'num_heads'? ...``.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kd_core.errors import RecipeError
from kd_core.recipe import Recipe
from kd_core.recipe.core_yaml import line_of, read_value, read_yaml, write_yaml
from kd_core.recipe.defaults import filled_in
from kd_core.recipe.places import from_folder
from kd_core.recipe.shipped import recipe_file, shipped_recipes

__all__ = ["dump_recipe", "load_recipe", "parse_recipe", "what_is_filled_in"]

_MAX_PROBLEMS = 5
_MAX_SHOWN = 200
_PART = re.compile(r"[^.\[\]]+")
_WORDS = (("tuple", "list"), ("Tuple", "List"), (" after validation", ""), ("dictionary or object to extract fields from", "mapping"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``a.b=value`` overrides.

    Relative paths in the file start from its own folder, those in overrides from the working directory.

    Args:
        path: a YAML file, or the name of a shipped recipe.
        overrides: each 'dotted.path=value'; list items by number ('prompts.sources.0.num=4400'). A value is one YAML 1.2 scalar,
            whole, with any # in it, or a list or a mapping in brackets; nothing is null.

    Raises:
        RecipeError: no such file, not YAML, a bad override, or not a valid recipe; with the line of what is wrong in the file.
    """
    data, text = _read_data(path, overrides)
    changed = [_parts(override.partition("=")[0]) for override in overrides]
    return _parse(data, str(path), lambda place: None if _meets(place, changed) else line_of(text, place))


def what_is_filled_in(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Dotted path -> value of the fields that a recipe file and its overrides leave to ``defaults``.

    Raises:
        RecipeError: no such file, not YAML, or a bad override; whether the recipe is valid is not asked.
    """
    return filled_in(_read_data(path, overrides)[0])


def _read_data(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The fields of a recipe with the overrides, and the text of its file."""
    file = recipe_file(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(shipped_recipes())
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read ({reason}); pass the path of a recipe such as mine.yaml, or a name: {names}") from None
    data = read_yaml(text, str(path))
    if data is None:
        raise RecipeError(f"{path}: is empty; kd init writes a first recipe, kd recipes shows some")
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else f"the value {data!r}"
        raise RecipeError(f"{path}: expected fields, each 'name: value', found {found}")
    from_folder(data, file.parent)
    for override in overrides:
        _apply_override(data, override)
    return data, text


def _parts(path: str) -> list[str]:
    return path.strip().split(".")


def _meets(place: Sequence[str | int], changed: Sequence[Sequence[str]]) -> bool:
    """Whether a place is, holds or lies in one that an override has changed: what the file says there is not what was read."""
    return any(all(str(a) == b for a, b in zip(place, path, strict=False)) for path in changed)


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(_parts(path)):
        raise RecipeError(f"--set {override!r}: expected path=value, for example --set training.steps=300")
    value = read_value(text, f"--set {path}")
    *parents, last = _parts(path)
    here: Any = data
    for i, part in enumerate(parents):
        here = _descend(here, part, ".".join(parents[: i + 1]), override)
    if isinstance(here, list):
        here[_index(here, last, path, override)] = value
    else:
        here[last] = value


def _descend(here: Any, part: str, path: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, path, override)]
    if here.get(part) is None:
        here[part] = {}
    if not isinstance(here[part], (dict, list)):
        raise RecipeError(f"--set {override}: {path} is the value {_shown(here[part])} and has no fields below it")
    return here[part]


def _index(items: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise RecipeError(f"--set {override}: {path} is a list of {len(items)}; use a number from 0 to {len(items) - 1}")
    return int(part)


def parse_recipe(data: Mapping[str, Any], *, origin: str) -> Recipe:
    """Validate plain data as a recipe.

    Args:
        data: fields of a recipe.
        origin: file name for messages.

    Raises:
        RecipeError: one line a problem: path in the YAML, what is wrong, what is allowed.
    """
    return _parse(data, origin, lambda place: None)


def _parse(data: Mapping[str, Any], origin: str, line: Callable[[Sequence[str | int]], int | None]) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [problem for problem in error.errors(include_url=False) if not _is_consequence(problem)]
        found = []
        for problem in problems[:_MAX_PROBLEMS]:
            place = _place(problem["loc"], data)
            said = place or _named(problem["msg"])
            number = line(said) if said else None
            where = origin if number is None else f"{origin}:{number}"
            found.append(f"{where}: {_problem_line(problem, _path(place))}")
        if len(problems) > _MAX_PROBLEMS:
            found.append(f"{origin}: and {len(problems) - _MAX_PROBLEMS} more problems")
        raise RecipeError("\n".join(dict.fromkeys(found))) from None


def _is_consequence(problem: Any) -> bool:
    """A list that is too short only because its items are not valid, which has lines of its own."""
    return bool(problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"])


def _problem_line(problem: Any, path: str) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _fields_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{path}: unknown field; {hint}allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{path}: this field is required and is not there"
    if kind == "union_tag_invalid":
        return f"{path}.kind: found {_shown(context['tag'])}; allowed: {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{path}: expected fields with a 'kind', found {_shown(problem['input'])}; allowed kinds: {_tags_at(problem['loc'])}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    for jargon, plain in _WORDS:
        message = message.replace(jargon, plain)
    return f"{path}: {message[0].lower()}{message[1:]}, found {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text):,} characters)"


_UNWRITTEN: Mapping[tuple[str | int, ...], str] = {("task",): "generation"}
"""Place -> the kind that stands there where none is written."""


def _place(loc: tuple[str | int, ...], data: Any) -> tuple[str | int, ...]:
    """The error's location without the tags that pydantic weaves in (of unions, of numbers turned to schedules): no keys of the YAML."""
    place: tuple[str | int, ...] = ()
    here, tagged = data, False
    for part in loc:
        if isinstance(part, int) and isinstance(here, (list, tuple)):
            place, here, tagged = (*place, part), here[part] if part < len(here) else None, False
        elif not isinstance(here, Mapping):
            break
        elif part == here.get("kind", _UNWRITTEN.get(place)) and not tagged:
            tagged = True
        else:
            place, here, tagged = (*place, part), here.get(str(part)), False
    return place


def _named(message: str) -> tuple[str | int, ...]:
    """The place that a problem of several fields names at its beginning.

    >>> _named("Value error, gate.rules[0].than: baseline is not in evaluation.compare")
    ('gate', 'rules', 0, 'than')
    """
    parts = _PART.findall(message.removeprefix("Value error, ").partition(": ")[0])
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _path(place: Sequence[str | int]) -> str:
    """
    >>> _path(("prompts", "sources", 0, "kind"))
    'prompts.sources[0].kind'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _models_at(loc: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The recipe models that a pydantic error location leads to."""
    models: list[type[BaseModel]] = [Recipe]
    chosen = False  # a tag stands once before the fields of its union, and may be spelt like one of them
    for part in loc:
        if isinstance(part, int):
            continue
        tagged = [] if chosen else [m for m in models if part in _tags(m)]
        chosen = bool(tagged)
        if tagged:
            models = tagged
            continue
        models = [leaf for m in models if part in m.model_fields for leaf in _leaf_models(m.model_fields[str(part)].annotation)]
    return models


def _leaf_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [leaf for inner in get_args(annotation) for leaf in _leaf_models(inner)]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()


def _fields_at(loc: tuple[str | int, ...]) -> list[str]:
    return sorted({name for model in _models_at(loc) for name in model.model_fields})


def _tags_at(loc: tuple[str | int, ...]) -> str:
    return ", ".join(sorted({tag for model in _models_at(loc) for tag in _tags(model)}))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every field written out."""
    return write_yaml(recipe.model_dump(mode="json"))
