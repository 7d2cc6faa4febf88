"""Rows of classes: a row is the hash of its input, as numbers, and the class, which alone is supervised."""

from kd_core.prompts.inputs import HASH_WORDS, hash_words, words_hash
from kd_core.tokens.batches import TokenRow

__all__ = ["class_row", "input_hash", "number_of"]


def class_row(sha256: str, number: int) -> TokenRow:
    """The row of an input and the number of its class.

    >>> row = class_row("ff" * 32, 3)
    >>> number_of(row), row.num_supervised, input_hash(row) == bytes.fromhex("ff" * 32)
    (3, 1, True)
    """
    return TokenRow((*hash_words(sha256), number), HASH_WORDS)


def input_hash(row: TokenRow) -> bytes:
    """SHA-256 of the row's input, 32 bytes."""
    return words_hash(row.ids[:HASH_WORDS])


def number_of(row: TokenRow) -> int:
    """Number of the row's class, from 0."""
    return int(row.ids[HASH_WORDS])
