r"""One spelling for what is written in many: Unicode, LaTeX layout and plain text brought to one plain LaTeX.

Changes how a text is written and never what it says: full-width digits, superscripts, narrow spaces and unicode
fractions become ASCII, \dfrac and \tfrac become \frac, \left and \! go. Every reader of answers starts from here.
"""

# ruff: noqa: RUF001, RUF002  # characters that look like others are the subject here

import re
import unicodedata

__all__ = ["canonical"]

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "÷": "/", "⁄": "/", "∕": "/", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R} ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "π": r"\pi ", "’": "'", "‘": "'",
    "“": '"', "”": '"', "⟨": "(", "⟩": ")", "…": r"\ldots ", "€": r"\text{EUR}", "£": r"\text{GBP}", "¥": r"\text{JPY}",
}  # fmt: skip
_GREEK = {
    chr(code): f"\\{unicodedata.name(chr(code)).split()[-1].lower().replace('lamda', 'lambda')} "
    for code in (*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA))
}
_CHARACTERS = str.maketrans(_GREEK | _SIGNS | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""))

_Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_LATEX = _rules(
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?", ""),
    (r"\\!\s*|\\(?:no)?pagebreak|\\phantom\{[^{}]*\}", ""),
    (r"\s*\{\s*,\s*\}\s*", ","),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:mbox|hbox|mathrm|mathbf|mathit|mathsf|textbf|textrm|textit|textnormal|textsf|emph|bf|operatorname\*?)\s*(?=\{)", r"\\text"),
    (r"\\text\s+\{", r"\\text{"),
    (r"(?<!\\)\\[,;: ]|~|\\(?:q?quad|thinspace|enspace|hspace\{[^{}]*\})(?![A-Za-z])", " "),
    (r"\\(?:leq(?:slant)?|le)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geq(?:slant)?|ge)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\(?:lt)(?![A-Za-z])", "<"),
    (r"\\(?:gt)(?![A-Za-z])", ">"),
    (r"\\(?:neq|ne)(?![A-Za-z])|!=", r"\\ne "),
    (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
    (r"\\(?:lbrack)(?![A-Za-z])", "["),
    (r"\\(?:rbrack)(?![A-Za-z])", "]"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\[lr]vert(?![A-Za-z])|\\[lr]?Vert(?![A-Za-z])", "|"),
    (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset"),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", r"\\text{ degrees}"),
    (r"\\%|％", "%"),
    (r"\\(?:cdotp|ast)(?![A-Za-z])", r"\\cdot "),
    (r"\\(?:dots|cdots|dotsc)(?![A-Za-z])|\.\.\.+", r"\\ldots "),
    (r"\\(?:div)(?![A-Za-z])", "/"),
    (r"\\(?:varphi)(?![A-Za-z])", r"\\phi"),
    (r"\\(?:simeq|thickapprox)(?![A-Za-z])", r"\\approx "),
    (r"(?<=[A-Za-z0-9)}])(?:\*\*| \*\* )(?=[0-9({-])", "^"),
    (r"\\text\{\s*\\\$\s*\}", r"\\$"),
    (r"(?<=[0-9])\s?x\s?(?=[0-9])", r" \\times "),
)


def canonical(text: str) -> str:
    r"""The text in one spelling, with single spaces, stripped.

    >>> canonical("３×10⁵"), canonical("2½"), canonical("\\left( 1\\,000,\\ \\dfrac{1}{2} \\right]")
    ('3\\times 10^{5}', '2 1/2', '( 1 000, \\frac{1}{2} ]')
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋]+", lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub(r"[¼-¾⅐-⅞]", _fraction, text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _fraction(found: re.Match[str]) -> str:
    before = found.string[found.start() - 1 : found.start()]
    return (" " if before.isdigit() else "") + unicodedata.normalize("NFKC", found[0]).replace("⁄", "/")
