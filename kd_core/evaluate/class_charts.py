"""Pictures, class probabilities and confusion matrices as parts of the report's page.

SVG written here in the page's CSS variables, so that one drawing is readable on light and dark; no size of its own, no ids, no
scripts. Every name is escaped. The same data gives the same text.
"""

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kd_core.errors import KDError
from kd_core.evaluate.charts import label_of
from kd_core.evaluate.report_data import ClassGuess, Confusion

__all__ = [
    "MAX_CLASSES",
    "MAX_GUESSES",
    "MAX_MODELS",
    "ConfusedPair",
    "class_bars",
    "confused_pairs",
    "confusion_matrix",
    "percent",
    "picture",
]

MAX_MODELS, MAX_GUESSES = 3, 3
MAX_CLASSES = 20
"""Classes of a confusion matrix that is drawn; with more, the most confused pairs are listed."""
MAX_PAIRS = 15
_COLORS = {"teacher": "teacher", "student": "student", "baseline": "baseline", "ablation_hard": "ablation", "champion": "champion"}

_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE_PIXELS = 96
"""Least length of a picture's longer side on the page."""

_BAR, _ROW, _HEAD = 150, 17, 19
_MAX_NAME = 15


def picture(png: bytes, title: str) -> str:
    """A PNG as an image element that holds its own bytes; a small one is scaled up by a whole factor, its pixels sharp.

    Raises:
        KDError: the bytes are no PNG.
    """
    if not png.startswith(_PNG) or len(png) < 24:
        raise KDError(f"a sample's picture must be a PNG, and its bytes begin with {png[:8]!r}; encode it as one")
    width, height = struct.unpack(">II", png[16:24])
    times = max(1, _PICTURE_PIXELS // max(width, height, 1))
    data = base64.b64encode(png).decode()
    sharp = ' class="sharp"' if times > 1 else ""
    return f'<img{sharp} alt="{escape(title)}" width="{width * times}" height="{height * times}" src="data:image/png;base64,{data}">'


def likeliest(guess: ClassGuess, true_class: str) -> list[tuple[str, float]]:
    """The 3 likeliest classes of a guess, and the true class where it is known and not among them."""
    first, rest = guess.probabilities[:MAX_GUESSES], guess.probabilities[MAX_GUESSES:]
    return [*first, *((name, probability) for name, probability in rest if name == true_class)]


def class_bars(guesses: Sequence[ClassGuess], true_class: str) -> str:
    """Probabilities of the likeliest classes as bars, a group for each of at most 3 models; the true class is marked with a dot."""
    groups = [(guess.model, likeliest(guess, true_class)) for guess in guesses[:MAX_MODELS]]
    longest = max((min(_MAX_NAME, len(name)) for _, bars in groups for name, _ in bars), default=0)
    left = 22 + 6 * longest
    parts, y = [], 0
    for model, bars in groups:
        color = f"var(--{_COLORS.get(model, 'muted')})"
        parts.append(f'<text x="0" y="{y + 13}" class="head" fill="{color}">{escape(label_of(model))}</text>')
        y += _HEAD
        for name, probability in bars:
            parts += _bar(name, probability, left, y, color, is_true=name == true_class)
            y += _ROW
        y += 6
    title = f"Class probabilities of {', '.join(label_of(model) for model, _ in groups)}; the true class is {true_class}"
    size = f"0 0 {left + _BAR + 48} {max(1, y - 6)}"
    return f'<svg class="bars" viewBox="{size}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _bar(name: str, probability: float, left: int, y: int, color: str, *, is_true: bool) -> list[str]:
    width = max(0.5, _BAR * min(1.0, max(0.0, probability)))
    dot = [f'<circle cx="4" cy="{y + 7}" r="3" fill="var(--good)"><title>the true class</title></circle>'] if is_true else []
    bold = ' font-weight="700"' if is_true else ""
    return [
        *dot,
        f'<text x="{left - 7}" y="{y + 11}" text-anchor="end" fill="currentColor"{bold}>{_short(name)}</text>',
        f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="10" rx="1" fill="{color}" fill-opacity="{0.9 if is_true else 0.45}"/>',
        f'<text x="{left + width + 6:.1f}" y="{y + 11}" fill="var(--muted)">{escape(percent(probability))}</text>',
    ]


def percent(share: float) -> str:
    """A share in percent, small ones not rounded to nothing.

    >>> percent(0.85), percent(0.004), percent(0.9996)
    ('85%', '<1%', '>99%')
    """
    if 0.0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1.0 else f"{share:.0%}"


def _short(name: str) -> str:
    return escape(name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…")


# ---------------------------------------------------------------------------------------------- confusion


@dataclass(frozen=True)
class ConfusedPair:
    """Items of one class that were taken for another: how many, and their share of that class, 0 to 1."""

    true_class: str
    taken_for: str
    count: int
    share: float


def confused_pairs(confusion: Confusion) -> list[ConfusedPair]:
    """List the 15 most frequent confusions, the most frequent first; as many in the order of their classes."""
    found = [
        ConfusedPair(confusion.classes[i], confusion.classes[j], count, count / sum(row))
        for i, row in enumerate(confusion.counts)
        for j, count in enumerate(row)
        if i != j and count > 0
    ]
    return sorted(found, key=lambda pair: -pair.count)[:MAX_PAIRS]


def confusion_matrix(confusion: Confusion) -> str:
    """Draw true classes (rows) against what they were taken for (columns), at most 20; shades are shares of a row."""
    num = len(confusion.classes)
    assert num <= MAX_CLASSES, "more classes are listed by their confused pairs"
    longest = max((len(_cut(name)) for name in confusion.classes), default=0)
    cell, left = 26, 12 + 7 * longest
    upright = longest > 3  # names that would run into each other stand upright
    top = 8 + (6 * longest if upright else 16)
    parts = []
    for i, (name, row) in enumerate(zip(confusion.classes, confusion.counts, strict=True)):
        x, y, total = left + cell * i, top + cell * i, max(1, sum(row))
        turn = f' transform="rotate(-90 {x + 17} {top - 6})" text-anchor="start"' if upright else ' text-anchor="middle"'
        parts.append(f'<text x="{x + (17 if upright else 13)}" y="{top - 6}" fill="var(--muted)"{turn}>{_short(name)}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 17}" text-anchor="end" fill="currentColor">{_short(name)}</text>')
        for j, count in enumerate(row):
            color = "var(--student)" if i == j else "var(--bad)"
            shade = f'fill="{color}" fill-opacity="{0.08 + 0.62 * count / total:.2f}"' if count else 'fill="none"'
            at = left + cell * j
            parts.append(f'<rect x="{at}" y="{y}" width="{cell - 1}" height="{cell - 1}" {shade} stroke="var(--rule)" stroke-width="0.5"/>')
            if count:
                parts.append(f'<text x="{at + 12.5}" y="{y + 17}" text-anchor="middle" fill="currentColor">{_count(count)}</text>')
    title = f"Confusion matrix of {label_of(confusion.model)}"
    size = f"0 0 {left + cell * num} {top + cell * num}"
    return f'<svg class="confusion" viewBox="{size}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _cut(name: str) -> str:
    return name[:_MAX_NAME]


def _count(count: int) -> str:
    """A count that fits a cell.

    >>> _count(987), _count(12_345)
    ('987', '12k')
    """
    return str(count) if count < 1000 else f"{count / 1000:.0f}k"
