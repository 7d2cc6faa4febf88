"""Which stages a field of the recipe moves: each field is changed in an example, and the graph drawn before and after.

Examples are made from the recipe's types, so a new kind of source, teacher or student is covered as soon as it is one. They are not
checked: what one field alone moves is the question, not what goes with what.
"""

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from kd_core.recipe import PretrainedStudent, Recipe, ServerTeacher
from kd_core.recipe.reference import Moves
from kd_core.stages.graph import Graph, build_graph
from kd_core.store import LocalStore

__all__ = ["field_moves"]

_MODELS = {"student", "baseline", "ablation_hard"}
_NAMED = {
    "revision": ("0123456789abcdef0123456789abcdef01234567", "76543210fedcba9876543210fedcba9876543210"),
    "max_refused_rows": (0, 1),
}
"""Two values of fields of whatever type."""
_DAY = datetime.date(2026, 1, 1)


def field_moves() -> Moves:
    """(dotted place, type, field) -> the first stages that a change moves, in some example.

    Groups of the graph are named; `training` is all models that are trained.
    """
    with TemporaryDirectory() as folder:
        examples, store = _Examples(_samples(Path(folder))), LocalStore(Path(folder) / "store")
        found: dict[tuple[str, str, str], frozenset[str]] = {}
        for recipe, below in examples.recipes():
            before = build_graph(recipe, store)
            for leaf in _leaves(recipe):
                if leaf.place.startswith(below):
                    changed = leaf.changed(examples.sample(leaf.model, leaf.name, other=True))
                    moved = _first_moved(before, build_graph(changed, store))
                    key = (leaf.place, leaf.model.__name__, leaf.name)
                    found[key] = found.get(key, frozenset()) | moved
        return found


def _first_moved(before: Graph, after: Graph) -> frozenset[str]:
    """Groups of the moved nodes of which nothing upstream moved."""
    moved = {name for name in before.keys() | after.keys() if _mark(before, name) != _mark(after, name)}
    first = {name for name in moved if not any(up in moved for graph in (before, after) for up in _above(graph, name))}
    groups = {name.partition(".")[0] for name in first}
    return frozenset(groups - _MODELS | {"training"} if groups >= _MODELS else groups)


def _mark(graph: Graph, name: str) -> str | None:
    return graph[name].fingerprint if name in graph else None


def _above(graph: Graph, name: str) -> Sequence[str]:
    return list(graph[name].upstream.values()) if name in graph else ()


# ---------------------------------------------------------------------------------------------- examples


def _samples(folder: Path) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(type, field) -> two values, where the type of the field alone does not say what the graph can read."""
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(f'{{"q": "{name}", "a": "{name}"}}\n')
    return {
        ("FileSource", "path"): (str(folder / "a.jsonl"), str(folder / "b.jsonl")),
        ("Recipe", "seeds"): ((0, 1), (0, 2)),
        ("Evaluation", "compare"): (("teacher", "baseline", "ablation_hard"), ()),
        ("S3Options", "endpoint"): (None, "http://127.0.0.1:1"),
        **{(kind, "prompt"): ("{q}", "{a}") for kind in ("FileSource", "DatasetSource")},
        **{(kind, name): ("{a}", "{q}") for kind in ("FileSource", "DatasetSource") for name in ("gold", "reference")},
    }


@dataclass
class _Examples:
    """Recipes that between them hold every field.

    Attributes:
        samples: values for some fields, by type and field.
        unions: place -> types that may stand there, as they are met.
    """

    samples: dict[tuple[str, str], tuple[Any, Any]]
    unions: dict[str, list[type[BaseModel]]] = field(default_factory=dict)

    def recipes(self) -> Iterator[tuple[Recipe, str]]:
        """(recipe, place below which its fields are to be changed): the first types everywhere, then every other one in its place.

        A teacher changes what other fields do, so beside each kind all fields are changed.
        """
        todo: list[tuple[dict[str, type[BaseModel]], str]] = [({}, "")]
        while todo:
            chosen, place = todo.pop(0)
            known = set(self.unions)
            if chosen.get(place) is ServerTeacher:
                chosen = {**chosen, "student": PretrainedStudent}  # no other goes with it
            yield self._recipe(chosen), "" if place == "teacher" else place
            new = [(inside, types) for inside, types in self.unions.items() if inside not in known]
            todo += [({**chosen, inside: other}, inside) for inside, types in new for other in types[1:]]

    def _recipe(self, chosen: dict[str, type[BaseModel]]) -> Recipe:
        recipe = self._example(Recipe, "", chosen)
        assert isinstance(recipe, Recipe)
        return recipe

    def _example(self, model: type[BaseModel], place: str, chosen: dict[str, type[BaseModel]]) -> BaseModel:
        values = {}
        for name, info in model.model_fields.items():
            inside = f"{place}.{name}".lstrip(".")
            types = list(dict.fromkeys(_models(info.annotation)))
            if not types:
                values[name] = self.sample(model, name, other=False)
                continue
            self.unions.setdefault(inside, types)
            part = self._example(chosen.get(inside, types[0]), inside, chosen)
            values[name] = (part,) if _is_list(info.annotation) else part
        return model.model_construct(**values)

    def sample(self, model: type[BaseModel], name: str, *, other: bool) -> Any:
        """One of two values of a field that holds no part."""
        if (model.__name__, name) in self.samples:
            return self.samples[model.__name__, name][other]
        return _value(model.model_fields[name].annotation, name, other=other)


def _value(annotation: Any, name: str, *, other: bool) -> Any:
    if name in _NAMED:
        return _NAMED[name][other]
    options, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return options[-1 if other else 0]
    if origin is tuple:
        return _values(options, name, other=other)
    if origin is dict:
        return {"option": int(other)}
    plain: dict[Any, tuple[Any, Any]] = {
        bool: (False, True),
        int: (2, 3),
        float: (0.5, 0.75),
        str: ("one", "two"),
        datetime.date: (_DAY, _DAY + datetime.timedelta(days=1)),
    }
    if annotation in plain:
        return plain[annotation][other]
    inner = next((option for option in options if option is not type(None)), None)
    assert inner is not None, f"{name}: say two values of {annotation} in _samples"
    return _value(inner, name, other=other)


def _values(options: Sequence[Any], name: str, *, other: bool) -> tuple[Any, ...]:
    """A list that is whole and one that is shorter, of names; else two of other values."""
    names = [value for option in options for value in _names(option)]
    if names:
        return tuple(names[:-1] if other else names)
    return tuple(itertools.islice((_value(options[0], name, other=flag) for flag in ((other, not other))), 2))


def _names(annotation: Any) -> Sequence[Any]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from _models(inner)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(get_origin(option) is tuple for option in get_args(annotation))


# ---------------------------------------------------------------------------------------------- changing one field


@dataclass(frozen=True)
class _Leaf:
    """A field without parts of its own.

    Attributes:
        place: dotted path of the part that holds it.
        model: type of that part.
        name: the field.
        changed: value -> the recipe with it.
    """

    place: str
    model: type[BaseModel]
    name: str
    changed: Callable[[Any], Recipe]


def _leaves(recipe: Recipe) -> Iterator[_Leaf]:
    yield from _leaves_of(recipe, "", lambda whole: whole)


def _leaves_of(part: BaseModel, place: str, rebuild: Callable[[Any], Recipe]) -> Iterator[_Leaf]:
    for name, info in type(part).model_fields.items():
        replace = partial(_replaced, part, name, rebuild)
        value, inside = getattr(part, name), f"{place}.{name}".lstrip(".")
        if isinstance(value, BaseModel):
            yield from _leaves_of(value, inside, replace)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield from _leaves_of(value[0], inside, partial(_alone, replace))
        elif name != "kind" or len(get_args(info.annotation)) > 1:
            yield _Leaf(place, type(part), name, replace)


def _alone(replace: Callable[[Any], Recipe], item: Any) -> Recipe:
    return replace((item,))


def _replaced(part: BaseModel, name: str, rebuild: Callable[[Any], Recipe], value: Any) -> Recipe:
    return rebuild(part.model_copy(update={name: value}))
