"""What a final answer can be: a number, a text, a list, a bracket, an equation, a matrix, or a formula that is left to sympy."""

from dataclasses import dataclass

from kd_core.curate.numbers import Number

__all__ = ["Bracket", "Choice", "Equation", "Form", "Formula", "Listing", "Matrix", "Text", "Union"]


@dataclass(frozen=True)
class Text:
    """Words, a choice, a time, a number in another base: equal when they are spelled the same."""

    words: str


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice with the value that stands beside it: '(C) 5' is both."""

    letter: str
    value: "Form"


@dataclass(frozen=True)
class Formula:
    """LaTeX of one value, or of one expression in variables."""

    latex: str


@dataclass(frozen=True)
class Listing:
    """Values whose order does not matter; ``is_set`` where they stood in braces."""

    items: "tuple[Form, ...]"
    is_set: bool


@dataclass(frozen=True)
class Bracket:
    """A tuple, a point or an interval: with round brackets they look alike, and an inequality in one variable is one too."""

    left: str
    items: "tuple[Form, ...]"
    right: str


@dataclass(frozen=True)
class Union:
    """Intervals or sets joined, in any order."""

    parts: "tuple[Form, ...]"


@dataclass(frozen=True)
class Matrix:
    """Rows of entries, whatever the brackets around them."""

    rows: "tuple[tuple[Form, ...], ...]"


@dataclass(frozen=True)
class Equation:
    """A relation. ``name`` is the left side where that only names what the right side, ``value``, is: 'x = 5'."""

    left: str
    operator: str
    right: str
    name: str | None = None
    value: "Form | None" = None


Form = Number | Text | Choice | Formula | Listing | Bracket | Union | Matrix | Equation
