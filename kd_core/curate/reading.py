r"""Reads a final answer as one of the forms (forms.py).

A text is read as a whole or not at all (None): no part of it stands for it. Splitting is done at the top level only,
outside of brackets and braces.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from kd_core.curate.canonical import canonical
from kd_core.curate.forms import Bracket, Choice, Equation, Form, Formula, Listing, Matrix, Text, Union
from kd_core.curate.formulas import PLAIN_FUNCTION, formula_latex
from kd_core.curate.numbers import Number, read_number
from kd_core.curate.splitting import closing, has_top_comma, is_balanced, split_list, top_level

__all__ = ["MAX_CHARACTERS", "read_form"]

MAX_CHARACTERS = 2000
"""A longer text is no final answer."""

_PREFIX = re.compile(r"(?:(?:approximately|approx\.?|about|around|roughly|exactly|only|just|\\approx|~)\s?)+", re.IGNORECASE)
_TEXT = re.compile(r"\\text\{\s*([^{}]*?)\s*\}")
_MATRIX = re.compile(r"\\begin\s?\{(?:[pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s?\{(?:[pbB]?matrix|array)\}")
_OPERATOR = re.compile(r"\\le |\\ge |\\ne |\\in(?![A-Za-z])|\\approx |[=<>]")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne", r"\approx": r"\approx"}
_SYMBOL = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9,]+\}|\\text\{[^{}]*\}))?'*"
_IS_SYMBOL = re.compile(rf"(?!\\(?:pi|infty)\b){_SYMBOL}")
_NAME = re.compile(
    rf"{_SYMBOL}(?:\^\{{-1\}})?(?:\([a-z](?:,\s?[a-z])*\))?|[A-Z]{{2,4}}|\\angle ?[A-Z]+|\\text\{{[^{{}}]*\}}"
    r"|[A-Za-z]{3,}(?: [A-Za-z]{3,})*|P\([A-Za-z ]+\)"
)
_NAMES = re.compile(rf"\(\s?{_SYMBOL}(?:,\s?{_SYMBOL})+\s?\)")
_BASED = re.compile(r"([0-9A-Fa-f]+)_\{?([0-9]{1,2})\}?")
_CLOCK = re.compile(r"[0-9]+(?:\s?:\s?[0-9]+)+(?:\s?[ap]\.?m\.?)?", re.IGNORECASE)
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z'.-]*(?:[ ,]+[A-Za-z][A-Za-z'.-]*)*\)?")
_REALS = {r"\mathbb{R}", "all real numbers", "all reals", "the set of all real numbers"}
_CHOICE = re.compile(r"\(([A-H])\)\s?[:.]?\s?([^()+*/=<>,].*)")
_BUILDER = re.compile(rf"\\\{{\s?{_SYMBOL}\s?(?:\\in\s?\\mathbb\{{R\}}\s?)?(?:\\mid|\\vert|\||:)\s?(.+?)\s?\\\}}")
_COUNTS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12,
}  # fmt: skip
_MAX_WORDS = 6


def read_form(text: str) -> Form | None:
    r"""What an extracted answer says; None where it cannot be read as a whole.

    >>> read_form("\\text{even}"), read_form("2*pi"), read_form("12 16")
    (Text(words='even'), Formula(latex='2 \\cdot \\pi '), None)
    """
    return _read(canonical(text)) if len(text) <= MAX_CHARACTERS else None


@lru_cache(maxsize=1 << 12)
def _read(text: str) -> Form | None:
    text = _bare(text)
    if not text or not is_balanced(text):
        return None
    for read in (read_number, _matrix, _fixed, _choice, _union, _listing, _relation, _bracket, _plus_minus, _words, _formula):
        form = read(text)
        if form is not None:
            return form
    return None


def _bare(text: str) -> str:
    """The text without delimiters, closing punctuation and words of approximation around it."""
    while True:
        before = text
        text = text.strip().rstrip(".,;:").removesuffix("\\").strip('`"').strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*")):
            inside = text[len(left) : len(text) - len(right)]
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and left not in inside.replace(r"\$", "")
            ):
                text = inside
        text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
        if (whole := _TEXT.fullmatch(text)) and re.search(r"[0-9,;]", whole[1]):
            text = whole[1]
        if text.startswith("{") and text.endswith("}") and closing(text, 0) == len(text) - 1 and not has_top_comma(text[1:-1]):
            text = text[1:-1]
        if text == before:
            return text


def _all(parts: Sequence[str]) -> "tuple[Form, ...] | None":
    forms = tuple(form for part in parts if (form := _read(part)) is not None)
    return forms if len(forms) == len(parts) else None


def _matrix(text: str) -> Matrix | None:
    found = _MATRIX.fullmatch(text)
    if found is None or r"\begin" in found[1]:
        return None
    rows = [_all([cell.strip() for cell in row.split("&")]) for row in re.split(r"\\\\", found[1]) if row.strip()]
    return Matrix(tuple(row for row in rows if row is not None)) if rows and None not in rows else None


def _fixed(text: str) -> Form | None:
    if text in (r"\emptyset", r"\{\}", r"\{ \}", "{}"):
        return Listing((), True)
    if text.lower() in _REALS or text in _REALS:
        return Bracket("(", (Formula(r"-\infty"), Formula(r"\infty")), ")")
    if text.lower() in ("infinity", "+infinity", r"+\infty", r"\text{infinity}"):
        return Formula(r"\infty")
    if text.lower() in ("-infinity", "negative infinity"):
        return Formula(r"-\infty")
    if text.lower() in _COUNTS:
        return Number(Fraction(_COUNTS[text.lower()]), "integer")
    if found := _BASED.fullmatch(text):
        return Text(f"{found[1].lower()}_{found[2]}")
    return Text(re.sub(r"[\s.]", "", text.lower())) if _CLOCK.fullmatch(text) else None


def _choice(text: str) -> Choice | None:
    found = _CHOICE.fullmatch(_TEXT.sub(r" \1 ", text).strip())
    value = _read(found[2]) if found else None
    return Choice(found[1], value) if found and value is not None else None


def _union(text: str) -> Union | None:
    top = top_level(text)
    if r"\cup" not in top:
        return None
    name = re.match(rf"{_SYMBOL}\s?\\in(?![A-Za-z])", text)
    cuts = [f.start() for f in re.finditer(r"\\cup", top)]
    starts = [name.end() if name else 0, *(cut + 4 for cut in cuts)]
    parts = _all([text[start:end].strip() for start, end in zip(starts, [*cuts, len(text)], strict=True)])
    return Union(parts) if parts is not None else None


def _listing(text: str) -> Form | None:
    parts = split_list(text, keep_thousands=True)
    if len(parts) < 2 or any(_is_prose(part) for part in parts):
        return None
    items = _all(parts)
    if items is None:
        return None
    if re.search(r"(?<![A-Za-z])or(?![A-Za-z])", text) and all(isinstance(item, Bracket) for item in items):
        return Union(items)
    if len({isinstance(item, Text) and len(item.words) > 1 for item in items}) > 1:
        return None  # words and values together are a sentence
    if len(items) == 2 and re.search(r"(?<![A-Za-z])and(?![A-Za-z])", text) and (both := _intersection(*items)):
        return both
    first = items[0]
    if isinstance(first, Equation) and first.name and first.value and not any(isinstance(item, Equation) for item in items[1:]):
        items = (first.value, *items[1:])  # 'x = 1, 2' names both
    return Listing(_flat(items), False)


def _intersection(one: Form, other: Form) -> Bracket | None:
    """'x > 2 and x < 7': one interval, from two that are bounded at one end each."""
    if not (isinstance(one, Bracket) and isinstance(other, Bracket) and len(one.items) == len(other.items) == 2):
        return None
    lower, upper = (one, other) if one.items[1] == Formula(r"\infty") else (other, one)
    if lower.items[1] != Formula(r"\infty") or upper.items[0] != Formula(r"-\infty") or lower.items[0] == upper.items[0]:
        return None
    return Bracket(lower.left, (lower.items[0], upper.items[1]), upper.right)


def _flat(items: "Sequence[Form]") -> "tuple[Form, ...]":
    return tuple(inner for item in items for inner in (item.items if isinstance(item, Listing) and not item.is_set else (item,)))


def _is_prose(part: str) -> bool:
    return _WORDS.fullmatch(part) is not None and len(part.split()) > 2


def _relation(text: str) -> Form | None:
    top = top_level(text)
    found = list(_OPERATOR.finditer(top))
    if not found:
        return None
    operators = [f[0].strip() for f in found]
    starts = [0, *(f.end() for f in found)]
    sides = [text[start:end].strip() for start, end in zip(starts, [*(f.start() for f in found), len(text)], strict=True)]
    if r"\in" in operators:
        return _read(sides[1]) if operators == [r"\in"] and _NAME.fullmatch(sides[0]) else None
    if operators[0] == r"\approx" or not all(sides):
        return None
    if set(operators) <= {"=", r"\approx"}:
        return _equation(sides)
    if len(sides) == 2:
        return _inequality(sides[0], operators[0], sides[1])
    return _chain(sides, operators) if len(sides) == 3 else None


def _equation(sides: list[str]) -> Form | None:
    left, right = sides[0], sides[-1]
    if _NAME.fullmatch(right) and not _NAME.fullmatch(left) and len(sides) == 2 and not _is_constant(right):
        left, right = right, left
    if (_NAME.fullmatch(left) and not _is_constant(left)) or _NAMES.fullmatch(left):
        value = _read(right)
        return Equation(left, "=", right, left, value) if value is not None else None
    if _is_constant(left):
        return _read(right)
    if formula_latex(left) is None or formula_latex(right) is None:
        return None
    return Equation(left, "=", right)


def _is_constant(text: str) -> bool:
    """Whether a side of an equation has no variables: '20 - 2', 'f(2) + f(3)'."""
    return not re.search(
        r"[A-Za-z]",
        re.sub(
            r"(?<![A-Za-z\\])[A-Za-z](?=\()|\\(?:frac|sqrt|pi|cdot|times|text|left|right)(?![A-Za-z])|(?<![A-Za-z])(?:x|\\times)(?=\s?[0-9])",
            "",
            text,
        ),
    )


def _inequality(left: str, operator: str, right: str) -> Form | None:
    if _IS_SYMBOL.fullmatch(right) and not _IS_SYMBOL.fullmatch(left):
        left, operator, right = right, _FLIPPED[operator], left
    if _IS_SYMBOL.fullmatch(left) and operator != r"\ne":
        bound = _read(right)
        if bound is None:
            return None
        infinite = Formula(r"-\infty"), Formula(r"\infty")
        if operator in ("<", r"\le"):
            return Bracket("(", (infinite[0], bound), ")" if operator == "<" else "]")
        return Bracket("(" if operator == ">" else "[", (bound, infinite[1]), ")")
    return Equation(left, operator, right) if formula_latex(left) and formula_latex(right) else None


def _chain(sides: list[str], operators: list[str]) -> Form | None:
    """An interval: 'a < x <= b'; 'a > x > b' is turned round."""
    if not _IS_SYMBOL.fullmatch(sides[1]):
        return None
    if set(operators) <= {">", r"\ge"}:
        sides, operators = sides[::-1], [_FLIPPED[o] for o in operators[::-1]]
    ends = _all([sides[0], sides[2]])
    if ends is None or not set(operators) <= {"<", r"\le"}:
        return None
    return Bracket("(" if operators[0] == "<" else "[", ends, ")" if operators[1] == "<" else "]")


def _bracket(text: str) -> Form | None:
    if (built := _BUILDER.fullmatch(text)) and (form := _read(built[1])) is not None:
        return form if isinstance(form, Bracket | Union) else None
    start = next((left for left in ("\\{", "(", "[", "{") if text.startswith(left)), None)
    end = next((right for right in ("\\}", ")", "]", "}") if text.endswith(right)), None)
    if start is None or end is None or closing(text, 0) != len(text) - len(end):
        return None
    parts = split_list(text[len(start) : len(text) - len(end)], keep_thousands=False)
    items = _all(parts)
    if items is None or not items:
        return None
    if start in ("\\{", "{"):
        return Listing(_flat(items), True) if end in ("\\}", "}") else None
    if len(items) == 1:
        return items[0] if (start, end) in (("(", ")"), ("[", "]")) else None
    is_infinite = [isinstance(item, Formula) and item.latex.replace(" ", "") in (r"-\infty", r"\infty") for item in items]
    if len(items) == 2:
        start, end = "(" if is_infinite[0] else start, ")" if is_infinite[1] else end
    return Bracket(start, items, end)


def _plus_minus(text: str) -> Listing | None:
    if len(re.findall(r"\\pm|\\mp", text)) != 1:
        return None
    halves = [re.sub(r"\\[pm][mp] ?", sign, text) for sign in ("+", "-")]
    items = _all([half.removeprefix("+") for half in halves])
    return Listing(items, False) if items is not None else None


def _words(text: str) -> Text | None:
    """Words, from \\text{} or bare; a single bare letter is a variable to sympy and a choice to people: spelling decides."""
    plain = _TEXT.sub(r" \1 ", text).strip()
    if not _WORDS.fullmatch(plain) or len(plain.split()) > _MAX_WORDS or "_" in plain:
        return None
    if PLAIN_FUNCTION.search(plain):
        return None
    if plain == text and len(plain) > 1 and not plain.startswith("(") and not re.search("[aeiouyAEIOUY]", plain):
        return None  # 'pqr' is a product
    plain = re.sub(r"[(),.]", " ", plain)
    words = [word for word in plain.split() if word.lower() not in ("the", "a", "an")] or plain.split()
    return Text(" ".join(words) if len(plain.strip()) == 1 else " ".join(words).lower())


def _formula(text: str) -> Formula | None:
    latex = formula_latex(text)
    return Formula(latex) if latex is not None else None
