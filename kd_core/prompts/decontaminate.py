"""Which prompts are copies of each other, and which are copies of an item that is held out.

Two prompts are the same if their words are (`kd_core.prompts.words`). They are near copies if the longer holds all figures
of the shorter, as with other numbers it is another problem, and `NEAR_SHARE` of its runs of five words; of a prompt under 20
words, all of them; under 13 words prompts can only be the same. Runs that many prompts share, such as an instruction before
each, are set aside first and count as no words.

Candidates come from a join over the sorted hashes of all runs and are compared in full, so unlike with a sketch (MinHash) no copy
is missed by chance; time and memory are linear in the number of words (some 80 bytes each).
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kd_core.prompts.words import figures_of, spelled, words_of

__all__ = ["NEAR_SHARE", "SuiteIndex", "Wording", "groups", "index_suite", "overlap", "set_aside_common", "wording"]

NEAR_SHARE = 0.6
_RUN_WORDS = 5
_LEAST_RUNS = 13 - _RUN_WORDS + 1
_LONG_RUNS = 20 - _RUN_WORDS + 1
_COMMON_PROMPTS, _COMMON_SHARE = 10, 0.01
_WINDOW = 16
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64)

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Wording:
    """What a prompt is compared by.

    Attributes:
        spelling: one spelling of all texts with the same words.
        figures: its numbers, operators and amounts, sorted.
        runs: hashes of its runs of five words, each once, sorted.
        own: those of them that few prompts share; the same until `set_aside_common`.
    """

    spelling: str
    figures: tuple[str, ...]
    runs: Hashes
    own: Hashes


def wording(text: str) -> Wording:
    """The wording of a prompt."""
    words = words_of(text)
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    num = max(0, len(words) - _RUN_WORDS + 1)
    runs = np.zeros(num, np.uint64)
    for i, factor in enumerate(_FACTORS):
        runs += hashes[i : i + num] * factor
    runs = np.unique(runs)
    return Wording(spelled(words), figures_of(words), runs, runs)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _keys(one: Wording) -> Hashes:
    """Its runs, each told apart from the same run beside other figures."""
    return one.runs ^ np.uint64(_word_hash("\n".join(one.figures)))


def set_aside_common(wordings: Sequence[Wording]) -> list[Wording]:
    """Take off the runs that more than ten and more than 1% of these prompts share: they identify none of them."""
    at_all = _common([one.runs for one in wordings])
    beside_figures = _common([_keys(one) for one in wordings])
    if not len(at_all):
        return list(wordings)
    return [replace(one, runs=one.runs[~np.isin(_keys(one), beside_figures)], own=one.runs[~np.isin(one.runs, at_all)]) for one in wordings]


def _common(runs: Sequence[Hashes]) -> Hashes:
    found, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *runs]), return_counts=True)
    return found[counts > max(_COMMON_PROMPTS, _COMMON_SHARE * len(runs))]


def groups(wordings: Sequence[Wording]) -> list[int]:
    """Number the group of each prompt: the first prompt that it is connected to by copies of copies."""
    parents = list(range(len(wordings)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    def connect(i: int, j: int) -> None:
        first, second = sorted((root(i), root(j)))
        parents[second] = first

    seen: dict[str, int] = {}
    for i, one in enumerate(wordings):
        connect(seen.setdefault(one.spelling, i), i)
    for i, j in _neighbours(wordings):
        if root(i) != root(j) and _are_near(wordings[i], wordings[j]):
            connect(i, j)
    return [root(i) for i in range(len(wordings))]


def _neighbours(wordings: Sequence[Wording]) -> Iterable[tuple[int, int]]:
    """Pairs with the same figures, and a run of both, that stand near each other in the list of all prompts with that run.

    Linear, where all pairs are not: of a hundred prompts with a run in common the first and the last are connected through those
    between, or through a run that fewer have.
    """
    long = [i for i, w in enumerate(wordings) if len(w.runs) >= _LEAST_RUNS]
    if len(long) < 2:
        return []
    keys = np.concatenate([_keys(wordings[i]) for i in long])
    owners = np.repeat(np.array(long, np.uint64), [len(wordings[i].runs) for i in long])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    pairs = np.zeros(0, np.uint64)
    for apart in range(1, _WINDOW + 1):
        equal = np.flatnonzero(keys[apart:] == keys[:-apart])
        if not len(equal):
            break
        pairs = np.union1d(pairs, (owners[equal] << np.uint64(32)) | owners[equal + apart])
    return [(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs]


def _are_near(one: Wording, other: Wording) -> bool:
    if one.figures == other.figures:
        return _holds(one.runs, other.runs)
    shorter, longer = sorted((one, other), key=lambda w: len(w.own))
    return Counter(shorter.figures) <= Counter(longer.figures) and _holds(one.own, other.own)


def _holds(one: Hashes, other: Hashes) -> bool:
    """Whether the longer has nearly all runs of the shorter."""
    shorter, longer = sorted((one, other), key=len)
    needed = len(shorter) * (NEAR_SHARE if len(shorter) >= _LONG_RUNS else 1)
    return len(shorter) >= _LEAST_RUNS and bool(np.isin(shorter, longer, assume_unique=True).sum() >= needed)


@dataclass(frozen=True)
class SuiteIndex:
    """The held-out items that prompts are compared with: every run of every item, sorted, with the item it is from."""

    spellings: frozenset[str]
    items: tuple[Wording, ...]
    runs: Hashes
    owners: NDArray[np.int64]


def index_suite(items: Sequence[Wording]) -> SuiteIndex:
    """Index a suite's items, common runs taken off."""
    long = tuple(item for item in items if len(item.runs) >= _LEAST_RUNS)
    runs = np.concatenate([np.zeros(0, np.uint64), *(item.runs for item in long)])
    order = np.argsort(runs, kind="stable")
    owners = np.repeat(np.arange(len(long)), [len(item.runs) for item in long])
    return SuiteIndex(frozenset(item.spelling for item in items), long, runs[order], owners[order])


def overlap(index: SuiteIndex, prompt: Wording) -> Literal["same", "near"] | None:
    """Whether a prompt has the words of an item, or is a near copy of one."""
    if prompt.spelling in index.spellings:
        return "same"
    first, last = np.searchsorted(index.runs, prompt.runs, "left"), np.searchsorted(index.runs, prompt.runs, "right")
    hits = [index.owners[i:j] for i, j in zip(first, last, strict=True) if i < j]
    if len(hits) < _LEAST_RUNS:
        return None
    owners, shared = np.unique(np.concatenate(hits), return_counts=True)
    return "near" if any(_are_near(index.items[i], prompt) for i in owners[shared >= _LEAST_RUNS]) else None
