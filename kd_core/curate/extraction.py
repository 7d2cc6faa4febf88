r"""Where the final answer stands in a text: the last box, what follows 'the answer is', or the end of the last sentence.

The same for an answer and for a reference. A text that holds several numbers and does not say which of them it means has
no final answer.
"""

import re
from itertools import pairwise

from kd_core.curate.forms import Form, Text
from kd_core.curate.numbers import Number
from kd_core.curate.reading import MAX_CHARACTERS, read_form

__all__ = ["read_final", "read_marked"]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_PHRASE = re.compile(r"\banswers?\b(?:[^.\n]{0,40}?(?:\bis\b|\bare\b|\bequals\b|=|:))(?:\s*\*\*)?\s*(?=\S)", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:at least|at most|(?:more|less|greater|fewer) than|(?:and|or) (?:more|less|fewer|so)"
    r"|not|never|cannot|neither|nor|unlikely|wrong|incorrect)\b|n't\b",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$(?![0-9][^$]*(?<![A-Za-z\\])[A-Za-z]{2,} )[^$\n]+\$", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|\n\s*\n")
_COPULA = re.compile(
    r".*(?:\b(?:is|are|was|were|be|equals?|gives?|gets?|get|obtain|have|has|becomes?|totals?)\b|:|\bof\b(?=\s*[$0-9]))[\s*]*(?=[^\s*])",
    re.IGNORECASE | re.DOTALL,
)
_ONE_NUMBER = re.compile(r"(?:[+\u2212-]\s?)?(?:\\?\$\s?)?(?:[0-9][0-9,.]*[0-9]|[0-9])(?:\s?%)?")
_CHANGED = re.compile(
    r"\s?(?:(?:more|less|fewer) than|or|and|plus|minus|times|percentage points|dozens?|scores?"
    r"|hal[fv]|thirds?|quarters?|squared|cubed|hundred|thousand|million|billion)\b",
    re.IGNORECASE,
)
_LISTED = re.compile(r"\b(?:and|or)\b|,(?![0-9]{3})|;")
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?![A-Za-z])")
_MAX_SENTENCE = 1000


def read_final(text: str) -> Form | None:
    r"""The final answer of a text, read; None where it has none that can be told or read.

    >>> read_final("First \\boxed{41}, corrected: \\boxed{42}").value, read_final("The answer is 2 2/3.").value
    (Fraction(42, 1), Fraction(8, 3))
    >>> read_final("The answer is not 42"), read_final("\\boxed{}"), read_final("Of 12 pieces 7 were pears")
    (None, None, None)
    """
    if boxes := list(_BOX.finditer(text)):
        return _unboxed(text[boxes[-1].end() :])
    whole = read_form(text) if len(text) <= MAX_CHARACTERS else None
    if whole is not None and (isinstance(whole, Number) or not _is_prose(text, whole)):
        return whole
    sentence = _after_phrase(text)
    is_answer = sentence is not None
    if sentence is None:
        sentence = _last_sentence(text[-2 * _MAX_SENTENCE :])
    if sentence is None or len(sentence) > _MAX_SENTENCE or _NEGATION.search(_MATH.sub(" ", sentence)):
        return None
    return _first_read(sentence, is_answer=is_answer)


def _is_prose(text: str, whole: Form) -> bool:
    """Whether a text that can be read as a whole is a sentence all the same."""
    if isinstance(whole, Text):
        return _PHRASE.search(text) is not None
    return re.search("[0-9]", text) is not None and len(_PLAIN_WORD.findall(re.sub(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}", " ", text))) >= 3


def read_marked(text: str) -> Form | None:
    """The final answer that follows a marker: its first line where that can be read, whatever is explained below it."""
    first = read_form(text.partition("\n")[0])
    if first is None or (isinstance(first, Text) and " " in first.words):
        return read_final(text)
    return first


def _unboxed(rest: str) -> Form | None:
    """What stands in a box, given the text after its command; None where the box is empty or was cut off."""
    if not rest.startswith("{"):
        return read_form(rest[:1])
    depth = 0
    for position, character in enumerate(re.sub(r"\\[{}]", "..", rest)):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return read_final(rest[1:position])
    return None


def _after_phrase(text: str) -> str | None:
    """The rest of the last sentence that says what the answer is, its negation kept in front; None where none does."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    found = phrases[-1]
    rest = text[found.end() : found.end() + _MAX_SENTENCE]
    ends = _ends(rest)
    return ("not " if _NEGATION.search(found[0]) else "") + (rest[: ends[0][0]] if ends else rest)


def _spans(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in _MATH.finditer(text)]


def _ends(text: str) -> list[tuple[int, int]]:
    """Where sentences end, outside of mathematics."""
    spans = _spans(text)
    return [found.span() for found in _SENTENCE_END.finditer(text) if not any(start < found.start() < end for start, end in spans)]


def _last_sentence(text: str) -> str | None:
    text = text.strip()
    cuts = [0, *(end for _, end in _ends(text)), len(text)]
    parts = [text[start:end].strip(" .!?\n") for start, end in pairwise(cuts)]
    return next((part for part in reversed(parts) if part), None)


def _first_read(sentence: str, *, is_answer: bool) -> Form | None:
    """The answer in one sentence: as a whole, after its last verb, its only formula, or its only number."""
    candidates = [sentence] if is_answer else []
    spans = _spans(sentence)
    masked = sentence
    for start, end in spans:
        masked = masked[:start] + "\0" * (end - start) + masked[end:]
    start = copula.end() if (copula := _COPULA.match(masked)) else 0
    if start:
        candidates.append(sentence[start:])
    *_, before, after = ["", "", *masked[start:].split("=")]
    if before and not _LISTED.search(before):
        candidates.append(sentence[len(sentence) - len(after) :])
    if spans and not re.search("[0-9]", masked[spans[-1][0] :]):
        start, end = spans[-1]
        candidates.append(sentence[start:end])
    numbers = list(_ONE_NUMBER.finditer(sentence))
    if not spans and len(numbers) == 1 and len(re.findall(r"[0-9]+", sentence)) == len(re.findall(r"[0-9]+", numbers[0][0])):
        after = sentence[numbers[0].end() :]
        if (
            re.match(r"\s[A-Za-z]|\s?[.,!;:]?\s*\Z|,\s[A-Za-z]", after)
            and not _CHANGED.match(after)
            and re.search(r"(?:\A|[\s(])\Z", sentence[: numbers[0].start()])
        ):
            candidates.append(numbers[0][0])
    for candidate in candidates:
        form = read_form(candidate)
        if form is not None and (is_answer or not isinstance(form, Text) or _MATH.fullmatch(candidate.strip())):
            return form
    return None
