r"""The words by which two prompts are compared when data is held out, so that spelling hides no copy.

Case, punctuation, invisible characters and odd spaces do not count; "1,000" is 1000, "five" is 5, ``\dfrac12`` is 1/2 and
``\cdot`` is *. What tells two problems apart stays: numbers, operators, brackets around them. Number words are English;
scripts written without spaces are split into characters.
"""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import regex

from kd_core.prompts.cleaning import normalise

__all__ = ["figures_of", "spelled", "words_of"]

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_SAME = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": " - ",
        "\N{FRACTION SLASH}": "/",
        "\N{DIVISION SIGN}": "/",
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{MIDDLE DOT}": "*",
        "\N{DOT OPERATOR}": "*",
        "\N{SQUARE ROOT}": " sqrt ",
        "\N{GREEK SMALL LETTER PI}": " pi ",
        "\N{DEGREE SIGN}": " degrees ",
    }
)
_LATEX = tuple(
    (regex.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[()\[\],;:! ]|\\q?quad\b|\$", " "),
        (r"\\(?:left|right|displaystyle|text(?:bf|it|rm)?|math(?:rm|bf|it|bb)|mbox|operatorname)(?![a-z])", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{(\w+)\}\s*\{(\w+)\}", r" \1/\2 "),
        (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" (\1)/(\2) "),
        (r"\\(?:cdot|times)(?![a-z])", "*"),
        (r"\\div(?![a-z])", "/"),
        (r"\\leq?(?![a-z])", "≤"),
        (r"\\geq?(?![a-z])", "≥"),
        (r"\\neq?(?![a-z])", "≠"),
        (r"\^\s*\{?\\circ\}?", " degrees "),
    )
)
_PLAIN = tuple(
    (regex.compile(pattern), plain)
    for pattern, plain in (
        (r"(?<![\w)])(\*\*?|__?)(?=\S)([^*_\n]+)(?<=\S)\1(?!\w)", r"\2"),  # Markdown's emphasis
        (r"(?<=\p{L})['\u2019\u02bc](?=\p{L})", ""),
        (r"(?<=\d)\{,\}(?=\d{3})", ","),
        (r"[(\[]([^()\[\]\d+*/=<>^-]*)[)\]]", r" \1 "),
        (r"<=", "≤"),
        (r">=", "≥"),
        (r"!=", "≠"),
    )
)
_THOUSANDS = regex.compile(r"(?<!\d|\d[.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_GROUPED = regex.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_RAISED = regex.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_TOKEN = regex.compile(
    r"\p{N}+(?:\.\p{N}+)?|(?<![\p{N}\p{L}])\.\p{N}+"
    r"|[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\p{L}\p{M}]+"
    r"|[+\-*/^<>=≤≥≠|%()\[\]]|(?<=[\d)])!"
)
_OPERATORS = frozenset("+-*/^<>=≤≥≠|%()[]!")
_UNITS = """zero one two three four five six seven eight nine ten eleven twelve
thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"""
_TENS = "thirty forty fifty sixty seventy eighty ninety hundred"
_NUMBERS = {word: str(i) for i, word in enumerate(_UNITS.split())} | {word: str(10 * i) for i, word in enumerate(_TENS.split(), start=3)}
_AMOUNTS = frozenset(("half", "third", "quarter", "twice", "thrice", "double", "triple", "dozen", "thousand", "million"))


def words_of(text: str) -> list[str]:
    r"""The words, numbers and operators of a text; its normalised self where it has none.

    >>> words_of("How many ARE 1,000\u200b apples?"), words_of(r"Find $\dfrac{1}{2}\cdot x$."), words_of("7 + 5 =")
    (['how', 'many', 'are', '1000', 'apples'], ['find', '1', '/', '2', '*', 'x'], ['7', '+', '5', '='])
    """
    tokens = _TOKEN.findall(_plain(text))
    kept = [_number(word) for i, word in enumerate(tokens) if word not in "-*/" or _joins(tokens, i)]
    return kept or [normalise(text)]


def _plain(text: str) -> str:
    if not text.isascii():
        text = _RAISED.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPTS), _GROUPED.sub("", text))
        text = unicodedata.normalize("NFKC", text).translate(_SAME)
        text = "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")
    text = text.casefold()
    if "\\" in text or "$" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    return str(_THOUSANDS.sub(lambda found: found[0].replace(",", ""), text))


def _joins(tokens: Sequence[str], i: int) -> bool:
    """Whether a -, * or / stands between figures; beside words it is a dash, a bullet or emphasis."""
    left, right = tokens[i - 1] if i else "ab", tokens[i + 1] if i + 1 < len(tokens) else "ab"
    return not _is_prose(right) and (tokens[i] == "-" or not _is_prose(left))


def _is_prose(word: str) -> bool:
    return len(word) > 1 and word[0].isalpha()


def _number(word: str) -> str:
    if "." in word:
        return ("0" + word if word[0] == "." else word).rstrip("0").rstrip(".")
    return "%" if word == "percent" else _NUMBERS.get(word, word)


def figures_of(words: Sequence[str]) -> tuple[str, ...]:
    """The numbers, operators and amounts among words, sorted: two problems in which they differ are two problems."""
    return tuple(sorted(word for word in words if word in _OPERATORS or word in _AMOUNTS or word[0].isdigit()))


def spelled(words: Sequence[str]) -> str:
    """One spelling of all texts with these words: spaces stand between words, none beside operators.

    >>> spelled(words_of("7 + 5 = ?")), spelled(words_of("How many?"))
    ('7+5=', 'how many')
    """
    pieces = [words[0]]
    for before, word in pairwise(words):
        pieces += [word] if before in _OPERATORS or word in _OPERATORS else [" ", word]
    return "".join(pieces)
