"""Whether two answers that were read say the same, decided alike from either side.

Numbers, lists, intervals and matrices are compared here, down to their single formulas, which sympy compares in a child
process. Nothing is right that could not be compared.
"""

from collections.abc import Iterable
from typing import Literal

from kd_core.curate.forms import Bracket, Choice, Equation, Form, Formula, Listing, Matrix, Text, Union
from kd_core.curate.numbers import Number, compare_numbers
from kd_core.curate.symbolic import compare_equations, compare_formulas

__all__ = ["Verdict", "same"]

Verdict = Literal["right", "wrong", "undecided"]


def same(left: Form, right: Form) -> Verdict:
    """Compare two forms.

    Returns:
        right: they say the same. wrong: they do not. undecided: they are of kinds that cannot be compared, or a limit was met.
    """
    if left == right:
        return "right"
    if isinstance(left, Choice) or isinstance(right, Choice):
        return _same_choices(left, right)
    if isinstance(left, Equation) or isinstance(right, Equation):
        return _same_equations(left, right)
    if isinstance(left, Number) and isinstance(right, Number):
        return compare_numbers(left, right)
    if isinstance(left, Text) and isinstance(right, Text):
        return "right" if left.words == right.words else "wrong"
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        if [len(row) for row in left.rows] != [len(row) for row in right.rows]:
            return "wrong"
        return _every(same(a, b) for one, other in zip(left.rows, right.rows, strict=True) for a, b in zip(one, other, strict=True))
    if isinstance(left, Union) and isinstance(right, Union):
        return _in_any_order(left.parts, right.parts)
    if isinstance(left, Bracket) and isinstance(right, Bracket):
        return _in_order(left.items, right.items) if (left.left, left.right) == (right.left, right.right) else "wrong"
    if isinstance(left, Listing) or isinstance(right, Listing):
        return _same_listings(left, right)
    return _same_values(left, right)


def _same_choices(left: Form, right: Form) -> Verdict:
    """'(C) 5' is C, and it is 5."""
    if isinstance(left, Choice) and isinstance(right, Choice):
        return "right" if left.letter == right.letter else "wrong"
    choice, other = (left, right) if isinstance(left, Choice) else (right, left)
    assert isinstance(choice, Choice), "one of the two is a choice"
    return same(Text(choice.letter) if isinstance(other, Text) and len(other.words) == 1 else choice.value, other)


def _same_values(left: Form, right: Form) -> Verdict:
    """Two single values of which at most one is a number; other kinds are never the same."""
    if isinstance(left, Text | Number | Formula) and isinstance(right, Text | Number | Formula):
        one, other = (_letter(form) for form in (left, right))
        if isinstance(one, Text) or isinstance(other, Text):
            return "wrong"
        found = compare_formulas(one, other)
        return "undecided" if found == "wrong" and (_is_degrees(one) or _is_degrees(other)) else found
    return "wrong"


def _is_degrees(form: Number | Formula) -> bool:
    """Whether a number is an angle in degrees, which a formula may give in radians."""
    return isinstance(form, Number) and form.unit is not None and form.unit.name == "degree"


def _letter(form: Text | Number | Formula) -> Text | Number | Formula:
    return Formula(form.words) if isinstance(form, Text) and len(form.words) == 1 else form


def _same_equations(left: Form, right: Form) -> Verdict:
    """'x = 5' is 5; an equation that names nothing only equals another equation."""
    if isinstance(left, Equation) and isinstance(right, Equation):
        if left.value is not None and right.value is not None and left.operator == right.operator == "=":
            if left.name == right.name:
                return same(left.value, right.value)
            if not (isinstance(left.value, Formula) and isinstance(right.value, Formula)):
                return "wrong"
        if not (_is_scalar(left) and _is_scalar(right)):
            return "undecided"
        return compare_equations((left.left, left.operator, left.right), (right.left, right.operator, right.right))
    equation, other = (left, right) if isinstance(left, Equation) else (right, left)
    assert isinstance(equation, Equation), "one of the two is an equation"
    if equation.value is not None:
        return same(equation.value, other)
    return "undecided" if isinstance(other, Number | Formula) else "wrong"


def _is_scalar(equation: Equation) -> bool:
    return equation.value is None or isinstance(equation.value, Number | Formula)


def _same_listings(left: Form, right: Form) -> Verdict:
    """A list in any order, or in its own where its members have different names: 'x = 1, y = 2' is the point (1, 2)."""
    if isinstance(left, Listing) and isinstance(right, Listing):
        if left.is_set or right.is_set:
            left, right = _distinct(left), _distinct(right)
        if _has_names(left) != _has_names(right):
            return _in_order(tuple(_value(item) for item in left.items), tuple(_value(item) for item in right.items))
        return _in_any_order(left.items, right.items)
    listing, other = (left, right) if isinstance(left, Listing) else (right, left)
    assert isinstance(listing, Listing), "one of the two is a list"
    if isinstance(other, Bracket):
        if listing.is_set or (other.left, other.right) != ("(", ")") or len(listing.items) != len(other.items):
            return "wrong"
        in_order = _in_order(tuple(_value(item) for item in listing.items), other.items)
        return in_order if _has_names(listing) or in_order == "wrong" else "undecided"
    if isinstance(other, Union) and not listing.is_set:
        return _in_any_order(listing.items, other.parts)
    return same(listing.items[0], other) if len(listing.items) == 1 else "wrong"


def _distinct(listing: Listing) -> Listing:
    kept: list[Form] = []
    for item in listing.items:
        if not any(same(item, other) == "right" for other in kept):
            kept.append(item)
    return Listing(tuple(kept), listing.is_set)


def _has_names(listing: Listing) -> bool:
    return len({item.name for item in listing.items if isinstance(item, Equation) and item.name}) > 1


def _value(item: Form) -> Form:
    return item.value if isinstance(item, Equation) and item.value is not None else item


def _every(verdicts: Iterable[Verdict]) -> Verdict:
    found: Verdict = "right"
    for verdict in verdicts:
        if verdict == "wrong":
            return "wrong"
        found = verdict if verdict == "undecided" else found
    return found


def _in_order(left: tuple[Form, ...], right: tuple[Form, ...]) -> Verdict:
    return _every(same(a, b) for a, b in zip(left, right, strict=True)) if len(left) == len(right) else "wrong"


def _in_any_order(left: tuple[Form, ...], right: tuple[Form, ...]) -> Verdict:
    if len(left) != len(right):
        return "wrong"
    rest, undecided = list(right), False
    for item in left:
        verdicts = [same(item, other) for other in rest]
        if "right" in verdicts:
            del rest[verdicts.index("right")]
        elif "undecided" in verdicts:
            undecided = True
        else:
            return "wrong"
    return "undecided" if undecided else "right"
