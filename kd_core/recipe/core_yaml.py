"""YAML as recipes are written in: version 1.2's core schema, read within bounds.

YAML 1.1, which PyYAML reads, takes 012 for ten, 1:30 for ninety and ``no`` for false. Here 012 is twelve and the others are
text. It refuses keys that are no text or stand twice, and what is too large or deep for a recipe, each with line and column.
"""

import re
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

from kd_core.errors import RecipeError

__all__ = ["line_of", "read_value", "read_yaml", "write_value", "write_yaml"]

_MAX_CHARACTERS = 1_000_000
_MAX_DEPTH = 50
_MAX_VALUES = 100_000
_MAX_DIGITS = 100
_CORE = (
    ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)", tuple("tTfF")),
    ("tag:yaml.org,2002:int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", tuple("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        tuple("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2 within bounds."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _problem(f"nested deeper than {_MAX_DEPTH}", self.peek_event())  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: Any) -> Any:
        _check_size(node)
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"key {key!r} is no text; put it in quotes", key_node)
            if key in seen:
                raise _problem(f"key {key!r} stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise _problem(f"a number of {len(text):,} digits", node)
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError:
            raise _problem(f"{text!r} is no whole number", node) from None

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        try:
            return float(text.replace(".", "", 1) if text.lower().endswith((".inf", ".nan")) else text)
        except ValueError:
            raise _problem(f"{text[:_MAX_DIGITS]!r} is no number", node) from None


class _ValueLoader(_Loader):
    """One value on a command line, in which no part may vanish as a comment."""

    def scan_to_next_token(self) -> None:
        start = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[start : self.pointer]:
            raise _problem("text from a # on would be lost as a comment; put the text in quotes", None)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for anything but text."""

    yaml_implicit_resolvers = {letter: list(pairs) for letter, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


_BREAKS = re.compile("[\x85\u2028\u2029]")
"""Line breaks of YAML 1.1 alone: a plain or single-quoted text would lose them."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _BREAKS.search(text) else None)


_Dumper.add_representer(str, _text)

for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern + r"\Z"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _problem(text: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark if at is not None else None)


def _check_size(root: yaml.Node) -> None:
    """Refuse aliases that stand for themselves, or for more values than a recipe has."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _problem("an alias stands for a value that holds it", node)
            return known
        sizes[id(node)] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        num = sizes[id(node)] = 1 + sum(map(size, children))
        if num > _MAX_VALUES:
            raise _problem(f"aliases make more than {_MAX_VALUES:,} values of it", node)
        return num

    size(root)


def read_yaml(text: str, origin: str) -> Any:
    """The plain data of one YAML document.

    Args:
        text: the document.
        origin: file name for messages.

    Raises:
        RecipeError: it is not YAML, or out of bounds; one line with line and column.
    """
    return _read(text, origin, _Loader)


def read_value(text: str, origin: str) -> Any:
    """The value of an override: a list, a mapping or quoted text as YAML has it, anything else one plain scalar, whole.

    >>> read_value("####", "x"), read_value("Use # for: x", "x"), read_value("012", "x"), read_value("[a, 1e-4]", "x")
    ('####', 'Use # for: x', 12, ['a', 0.0001])
    """
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        return _read(text, origin, _ValueLoader)
    plain = _Loader("")
    tag = plain.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    node = yaml.ScalarNode(tag, text)
    try:
        return plain.construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: {getattr(error, 'problem', error)}") from None


def line_of(text: str, path: Sequence[str | int]) -> int | None:
    """The line, from 1, at which a place stands in a document that ``read_yaml`` reads; of one that is not there, what would hold it.

    >>> line_of("a: 1\\nb:\\n  c: [x, {d: 2}]\\n  e: 3", ("b", "c", 1, "d")), line_of("a: 1\\nb: {c: 1}", ("b", "x"))
    (3, 2)
    """
    here, line = yaml.compose(text, Loader=_Loader), None
    for part in path:
        if isinstance(here, yaml.MappingNode):
            key, value = next(((k, v) for k, v in here.value if k.value == part), (None, None))
            line, here = (line if key is None else key.start_mark.line + 1), value
        elif isinstance(here, yaml.SequenceNode) and isinstance(part, int) and part < len(here.value):
            here = here.value[part]
            line = here.start_mark.line + 1
        else:
            break
    return line


def _read(text: str, origin: str, loader: type[_Loader]) -> Any:
    if len(text) > _MAX_CHARACTERS:
        raise RecipeError(f"{origin}: {len(text):,} characters are no recipe; at most {_MAX_CHARACTERS:,} are read")
    try:
        return yaml.load(text, Loader=loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{origin}:{line}: not valid YAML: the character U+{ord(text[error.position]):04X} may not stand in it") from None
    except RecursionError:
        raise RecipeError(f"{origin}: not valid YAML: nested deeper than {_MAX_DEPTH}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def write_yaml(data: Any) -> str:
    """Plain data as YAML that versions 1.1 and 1.2 read alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_value(value: Any) -> str:
    """One value in a line, as ``read_value`` reads it.

    >>> write_value([{"kind": "held_out"}]), write_value(None), write_value("no")
    ('[{kind: held_out}]', 'null', "'no'")
    """
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=_MAX_CHARACTERS)
    return str(text).removesuffix("...\n").strip()
