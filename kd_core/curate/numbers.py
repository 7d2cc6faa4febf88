r"""Plain numbers, read exactly: signs, thousands, fractions, mixed numbers, percent, powers of ten, units.

A text is a number only as a whole. '2 2/3' is 8/3; '12 16' and '2\frac{10}{3}' are no number, and nothing in them is.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["Number", "Unit", "compare_numbers", "read_number", "read_unit"]

_MAX_CHARACTERS = 400
_MAX_BITS = 4096
"""Powers with more bits are left to the symbolic reader."""
_TOLERANCE = Fraction(1, 10**6)

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)"
_SCALED = re.compile(
    rf"(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[+-]?[0-9]{{1,4}})"
    r"|\s?(?:\\times|\\cdot|\*|x)\s?10\s?(?:\^|\*\*)\s?(?:\{\s?(?P<ten>[+-]?\s?[0-9]{1,4})\s?\}|(?P<bare>[+-]?[0-9]{1,4})))?"
)
_REPEATING = re.compile(rf"(?P<head>{_WHOLE}?\.[0-9]*)\\overline\s?\{{(?P<period>[0-9]+)\}}")
_RATIO = re.compile(
    rf"\\frac\s?(?:\{{\s?(?P<a>[+-]?\s?{_DECIMAL})\s?\}}|(?P<a1>[0-9]))\s?(?:\{{\s?(?P<b>-?\s?{_DECIMAL})\s?\}}|(?P<b1>[0-9]))"
    rf"|\(?(?P<c>{_DECIMAL})\)?\s?/\s?\(?(?P<d>-?\s?{_DECIMAL})\)?"
)
_POWER = re.compile(rf"(?P<base>{_DECIMAL})\s?\^\s?(?:\{{\s?(?P<n>[+-]?[0-9]{{1,5}})\s?\}}|(?P<n1>[0-9])(?![0-9]))")
_MIXED = re.compile(r"(?P<whole>[0-9]+)\s?(?P<part>\\frac.*)|(?P<whole_>[0-9]+)(?: | and )(?P<part_>[0-9]+\s?/\s?[0-9]+)")
_SIGN = r"[+-]"
_CURRENCY = r"(?:\\?\$|\\text\{(?:EUR|GBP|JPY)\}|USD|EUR|GBP|Rs\.?)"
_CURRENCIES = {"$": "dollar", "USD": "dollar", "EUR": "eur", "GBP": "gbp", "JPY": "jpy", "Rs": "rs"}
_HEAD = re.compile(rf"(?P<sign>{_SIGN}?)\s?(?P<currency>{_CURRENCY}?)\s?(?P<inner>{_SIGN}?)\s?")
_NEGATIVE_IN_PARENTHESES = re.compile(r"\(\s?(-[^()]*)\)")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s?({'|'.join(_SCALES)})(?![a-z])", re.IGNORECASE)
_PERCENT = re.compile(r"\s?(?:%|\\?text\{\s?percent\s?\}|percent(?:age)?(?![a-z])|pct(?![a-z]))", re.IGNORECASE)

_UNIT = re.compile(r"[A-Za-z/](?:[A-Za-z.'/, -]|\^(?:\{[23]\}|[23]))*")
_NO_UNIT = re.compile(
    r"\A\s*(?:and|or)\b|\b(?:and|or) (?:more|less|fewer|so)\b"
    r"|\b(?:not|no|never|than|plus|minus|times|over|least|most|between|to|from|is|are|was|equals?|dozens?|halves|half|thirds?|quarters?"
    r"|squared|cubed|remainder|but|except|mod|modulo|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|sqrt|infinity|if|when|where|for|ago|before|after|hundred|thousand"
    r"|million|billion|trillion|e|i|x|y|z|n|k)\b|n't\b",
    re.IGNORECASE,
)
_MEASURES = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre", "inch inche in",
        "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram gm", "kg kilogram", "lb pound", "oz ounce", "ton tonne",
        "ml milliliter millilitre", "l liter litre", "gallon gal", "quart", "pint", "cup", "s second sec", "min minute",
        "h hour hr", "day", "week", "month", "year yr", "degree deg", "radian rad", "dollar usd buck", "cent", "eur euro", "gbp",
        "jpy yen", "rs rupee", "unit", "mph", "kmph kph", "hectare", "acre",
    )
    for name in names.split()
}  # fmt: skip
_ASIDE = re.compile(r"\([A-Za-z][A-Za-z .,'-]*\)")
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3}


@dataclass(frozen=True)
class Unit:
    """The measure that a number is given in.

    Attributes:
        name: its common sign, in lower case; empty for what is no measure, such as apples, which is never compared.
        power: 2 for squares, 3 for cubes.
    """

    name: str
    power: int


@dataclass(frozen=True)
class Number:
    """An exact value and how it was written.

    Attributes:
        value: exact.
        form: integer and decimal are written out in digits; ratio is a fraction, a mixed number or a power.
        digits: written digits of a decimal, leading zeros apart: what it may have been rounded to.
        percent: whether it carries a percent sign; value is then not divided by 100.
        unit: what it counts, if it says.
    """

    value: Fraction
    form: Literal["integer", "decimal", "ratio"]
    digits: int = 0
    percent: bool = False
    unit: Unit | None = None


def read_number(text: str) -> Number | None:
    r"""The number that a canonical text is as a whole, its unit taken off; None where it is not one.

    >>> read_number("-1 1/4").value, read_number("$1,234.50").value, read_number("60,000 dollars").value
    (Fraction(-5, 4), Fraction(2469, 2), Fraction(60000, 1))
    >>> read_number("12 16"), read_number("5xy"), read_number("2 x")
    (None, None, None)
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    if found := _NEGATIVE_IN_PARENTHESES.fullmatch(text):
        text = found[1]
    head = _HEAD.match(text)
    assert head is not None, "every part of the head may be absent"
    if head["sign"] and head["inner"]:
        return None
    body = text[head.end() :]
    read = _read_unsigned(body)
    if read is None:
        return None
    number, end = read
    rest = body[end:]
    value = number.value
    if scale := _SCALE.match(rest):
        value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
    percent = _PERCENT.match(rest)
    if percent is not None:
        rest = rest[percent.end() :]
    unit = read_unit(rest)
    if unit is None and rest.strip(" .,;"):
        return None
    if head["currency"]:
        unit = Unit(_CURRENCIES[re.sub(r"\\text|[\\{}.]", "", head["currency"])], 1)
    negative = "-" in (head["sign"], head["inner"])
    return Number(-value if negative else value, number.form, number.digits, percent is not None, unit)


def _read_unsigned(text: str) -> tuple[Number, int] | None:
    """The longest unsigned number at the beginning of a text, and where it ends."""
    readings = [reading for read in (_mixed, _ratio, _power, _repeating, _scaled) if (reading := read(text)) is not None]
    return max(readings, key=lambda reading: reading[1], default=None)


def _scaled(text: str) -> tuple[Number, int] | None:
    found = _SCALED.match(text)
    if found is None:
        return None
    mantissa = re.sub("[, ]", "", found["mantissa"])
    exponent = int((found["e"] or found["ten"] or found["bare"] or "0").replace(" ", ""))
    if abs(exponent) * 4 > _MAX_BITS:
        return None
    is_decimal = "." in mantissa.rstrip(".") or exponent != 0
    digits = len(mantissa.replace(".", "").lstrip("0")) if is_decimal else 0
    value = Fraction(mantissa) * Fraction(10) ** exponent
    return Number(value, "decimal" if is_decimal else "integer", digits), found.end()


def _repeating(text: str) -> tuple[Number, int] | None:
    found = _REPEATING.match(text)
    if found is None:
        return None
    head, period = found["head"].replace(",", "").replace(" ", ""), found["period"]
    shift = 10 ** len(head.partition(".")[2])
    start = Fraction(head if head != "." else "0")
    return Number(start + Fraction(int(period), shift * (10 ** len(period) - 1)), "ratio"), found.end()


def _ratio(text: str) -> tuple[Number, int] | None:
    found = _RATIO.match(text)
    if found is None:
        return None
    over, under = (Fraction(re.sub("[, ]", "", found[a] or found[b] or found[c])) for a, b, c in (("a", "a1", "c"), ("b", "b1", "d")))
    return None if under == 0 else (Number(over / under, "ratio"), found.end())


def _power(text: str) -> tuple[Number, int] | None:
    found = _POWER.match(text)
    if found is None:
        return None
    base, exponent = Fraction(re.sub("[, ]", "", found["base"])), int(found["n"] or found["n1"])
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
    return None if bits > _MAX_BITS or (base == 0 and exponent <= 0) else (Number(base**exponent, "ratio"), found.end())


def _mixed(text: str) -> tuple[Number, int] | None:
    found = _MIXED.match(text)
    if found is None:
        return None
    part_at = found.start("part") if found["part"] else found.start("part_")
    read = _ratio(text[part_at:])
    if read is None or not 0 < read[0].value < 1:
        return None
    return Number(int(found["whole"] or found["whole_"]) + read[0].value, "ratio"), part_at + read[1]


def read_unit(text: str) -> Unit | None:
    r"""The unit that a text after a number is as a whole; None where it is none, or may be part of a formula.

    >>> read_unit(r"\text{ square inches}"), read_unit(" apples each"), read_unit(" x")
    (Unit(name='inch', power=2), Unit(name='', power=1), None)
    """
    plain = re.sub(r"\\text\s?\{([^{}]*)\}", r" \1 ", text)
    plain = _ASIDE.sub(" ", plain).strip(" .,;")
    if not plain:
        return Unit("", 1) if text.strip(" .,;") else None
    if not _UNIT.fullmatch(plain) or _NO_UNIT.search(plain):
        return None
    words = re.sub(r"\^\{?[23]\}?|[,.]", " ", plain.lower()).split()
    if not words or ("\\text" not in text and not _are_words(words, apart=text.startswith(" "))):
        return None
    power = max([int(n) for n in re.findall(r"\^\{?([23])", plain)] + [_POWERS.get(word, 1) for word in words])
    words = [word for word in words if word not in _POWERS] or words
    if "/" in words or "per" in words or (words[0] == "in" and len(words) > 1):
        return Unit("", 1)
    name = _MEASURES.get(words[0], _MEASURES.get(_singular(words[0]), ""))
    return Unit(name, power if name else 1)


def _are_words(words: list[str], *, apart: bool) -> bool:
    """Whether letters after a number are words and no product of variables."""
    if not apart and len(words) == 1 and words[0] in ("st", "nd", "rd", "th"):
        return True
    if not apart and len(words[0]) == 1:
        return False
    if len(words) == 1 and len(words[0]) < 3:
        return words[0] in _MEASURES
    return all(len(word) > 3 or word in _MEASURES or word in _POWERS or re.search("[aeiou/]", word) for word in words)


def _singular(word: str) -> str:
    word = word.strip("'.-")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def compare_numbers(left: Number, right: Number) -> Literal["right", "wrong", "undecided"]:
    """Whether two numbers are the same: exactly, and within 1e-6 of the exact one where the other is its rounded decimal.

    A percent sign may be meant or not: 50% is 50 and 0.5. Numbers in different measures are never the same; where their
    values differ too, one may be the other converted, and nothing is said.
    """
    same = _same_value(left, right)
    if not same and left.percent != right.percent:
        share, plain = (left, right) if left.percent else (right, left)
        same = _same_value(Number(share.value / 100, share.form, share.digits), plain)
    if left.unit and right.unit and left.unit.name and right.unit.name and left.unit != right.unit:
        return "wrong" if same else "undecided"
    return "right" if same else "wrong"


def _same_value(left: Number, right: Number) -> bool:
    if left.value == right.value:
        return True
    if {left.form, right.form} != {"decimal", "ratio"}:
        return False
    rounded, exact = (left, right) if left.form == "decimal" else (right, left)
    return not _has_digits(exact.value, rounded.digits) and abs(rounded.value - exact.value) <= _TOLERANCE * abs(exact.value)


def _has_digits(value: Fraction, digits: int) -> bool:
    """Whether a value can be written out in so many significant digits, so that a decimal of them need not be rounded."""
    scaled = abs(value) * 10 ** value.denominator.bit_length()
    if scaled.denominator != 1:
        return False
    whole = scaled.numerator
    while whole and whole % 10 == 0:
        whole //= 10
    return bool(whole < 10**digits)
