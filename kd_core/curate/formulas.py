r"""One formula as math-verify's parser is to read it: what people leave out is put in, what has two readings is refused."""

import re

from kd_core.curate.numbers import read_unit

__all__ = ["PLAIN_FUNCTION", "formula_latex"]

_MAX_FORMULA_CHARACTERS = 1000
PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi|theta|alpha|beta|infty)(?![A-Za-z])"
)
"""A function or constant that was written without its backslash."""
_DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?[0-9]\}?)?)\s?[({]?\s?([0-9.]+)\\text\{ degrees\}\s?[)}]?")


def _small_fraction(found: re.Match[str]) -> str:
    """'\\frac12' and '\\frac a{b}' with the braces that they leave out."""
    under = f"{{{found[3]}}}" if found[3] else ""
    return f"\\frac{{{found[1] or found[2]}}}{under}"


def formula_latex(text: str) -> str | None:
    """Anything else that looks like mathematics; a unit at its end is taken off."""
    text = _DEGREES.sub(r"\1 (\\frac{\2 \\pi}{180})", text)
    if found := re.search(r"(\\text\{[^{}]*\}(?:\^\{?[23]\}?)?|(?<=[0-9})]) [a-z]{2,}\.?)\Z", text):
        if read_unit(" " + found[1]) is None:
            return None
        text = text[: found.start()].strip()
    text = PLAIN_FUNCTION.sub(r"\\\1 ", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt", text)
    text = re.sub(r"\\sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s?([0-9]|[a-z])(?![A-Za-z0-9])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s?([0-9]+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\log\s?_\s?([0-9a-z])(?![0-9])", r"\\log_{\1} ", text)
    text = re.sub(r"(\\frac\s?\{[^{}]*\})\s?([A-Za-z0-9])", r"\1{\2}", text)
    text = re.sub(r"\\frac(?:\s([A-Za-z])|\s?([0-9]))\s?(?:([A-Za-z0-9])|(?=\{))", _small_fraction, text)
    text = re.sub(r"\^\s?\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s?(-?[0-9]{2,})", r"^{\1}", text)
    text = re.sub(r"\s?\*\s?", r" \\cdot ", text)
    text = re.sub(r"(\\[a-z]+)\s?\^\s?([0-9])(?![0-9])", r"\1^{\2} ", text)
    text = re.sub(r"(?<=[0-9])\s?\(", r" \\cdot (", text)  # '2 (3)' is no mixed number
    if (
        not 0 < len(text) <= _MAX_FORMULA_CHARACTERS
        or re.search(r"[?!]{2}|\\ldots|\\begin|\\text|[0-9] [0-9]|[\"`;:@#&]|\$", text)
        or re.search(r"(?<!\\)\\\\", text)
    ):
        return None
    if re.search(r"/\s?[0-9]+\s?[A-Za-z\\(]", text):
        return None  # 1/2x is read in two ways
    if re.search(r"(?<![A-Za-z\\])[A-Za-z]{4,}", text) or re.search(
        r"(?<![A-Za-z\\])[A-Za-z]{2,} [A-Za-z]{2,}|(?<= )[A-Za-z]{2,}(?= )", text
    ):
        return None
    if re.search(r"[0-9)}]\s?\\frac\s?\{?[0-9]", text) and not re.search(r"[-+*/(={]\s?\\frac", text) and re.match(r"-?[0-9]", text):
        return None  # a whole number before a fraction that is no mixed number
    return text
