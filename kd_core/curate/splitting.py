"""Where a formula may be split: at the top level, outside of brackets and braces of any kind."""

import re
from collections.abc import Iterator

__all__ = ["closing", "has_top_comma", "is_balanced", "split_list", "top_level"]

_MAX_DEPTH = 20


_AND = re.compile(r"\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")


def is_balanced(text: str) -> bool:
    """Whether braces close, and no brackets are nested deeper than an answer's are."""
    depth = 0
    for character in re.sub(r"\\[{}]", "", text):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and all(level <= _MAX_DEPTH for _, _, level in _depths(text))


def _depths(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, character, depth) where a bracket of any kind goes one deeper; intervals may close with another kind."""
    depth, i = 0, 0
    while i < len(text):
        token = text[i : i + 2] if text[i] == "\\" and text[i + 1 : i + 2] in "{}" else text[i]
        if token in ("(", "[", "{", "\\{"):
            depth += 1
            yield i, token, depth
        elif token in (")", "]", "}", "\\}"):
            yield i, token, depth
            depth -= 1
        else:
            yield i, token, depth
        i += len(token)


def top_level(text: str) -> str:
    """The text with blanks in place of all that stands in brackets; positions stay."""
    return "".join(token if depth == 0 else " " * len(token) for _, token, depth in _depths(text))


def closing(text: str, start: int) -> int:
    for position, token, depth in _depths(text):
        if position > start and depth == 1 and token in (")", "]", "}", "\\}"):
            return position
    return -1


def has_top_comma(text: str) -> bool:
    return any(token == "," and depth == 0 for _, token, depth in _depths(text))


def split_list(text: str, *, keep_thousands: bool) -> list[str]:
    """The parts between commas, semicolons and 'and' or 'or' at the top level; a comma inside a number is none where asked."""
    cuts: list[tuple[int, int]] = []
    top = top_level(text)
    for found in re.finditer("[,;]", top):
        at = found.start()
        if keep_thousands and re.search(r"[0-9]\Z", text[:at]) and re.match(r",[0-9]{3}(?![0-9])", text[at:]):
            continue
        cuts.append((at, at + 1))
    cuts += [
        (f.start(), f.end())
        for f in _AND.finditer(text)
        if top[f.start() : f.end()].strip() or text[f.start() : f.end()].strip().startswith("\\text")
    ]
    parts, last = [], 0
    for start, end in sorted(cuts):
        if start >= last:
            parts.append(text[last:start].strip())
            last = end
    return [part for part in [*parts, text[last:].strip()] if part]
