"""Overlap between training prompts and a benchmark.

A prompt overlaps with a suite if their normalised texts are equal, or if they share 13 consecutive words; prompts under
13 words can only be equal. Words are runs of letters and digits, so punctuation hides nothing. A run of words that
stands in more than ten of the suite's own items is a template, not a question, and identifies no item: without this, one
long instruction shared by a whole family of problems would remove every training prompt.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (13-grams; boilerplate beyond ten documents).
Limit: a language written without spaces has long words, so there it is equality in effect.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NGRAM_WORDS", "SuiteIndex", "index_suite", "overlaps"]

NGRAM_WORDS = 13
_BOILERPLATE_ITEMS = 10
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class SuiteIndex:
    """What identifies the items of one suite: whole normalised texts, and word n-grams."""

    name: str
    texts: frozenset[str]
    ngrams: frozenset[str]


def _ngrams(normalised: str) -> set[str]:
    words = _WORD.findall(normalised)
    return {" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


def index_suite(name: str, normalised: Iterable[str]) -> SuiteIndex:
    """Index a suite's normalised prompts."""
    texts = frozenset(normalised)
    num_items = Counter(ngram for text in texts for ngram in _ngrams(text))
    return SuiteIndex(name, texts, frozenset(ngram for ngram, num in num_items.items() if num <= _BOILERPLATE_ITEMS))


def overlaps(index: SuiteIndex, normalised: str) -> bool:
    """Whether a normalised prompt repeats an item of the suite, or 13 words of one."""
    return normalised in index.texts or not index.ngrams.isdisjoint(_ngrams(normalised))
