"""What a prompt's text is, which identity it has, and on which side of the split a text falls.

All three are pure functions of the text: no row order, no seed, no source takes part. So the same prompt has the same
identity and stays on the same side in every recipe with the same shares, near copies aside (`kd_core.prompts.collect`).
"""

import hashlib
import unicodedata
from typing import Literal

from kd_core.fingerprint import FINGERPRINT_HEX
from kd_core.recipe import Split

__all__ = ["Side", "clean", "normalise", "prompt_id", "side_of"]

Side = Literal["train", "validation", "test"]


def clean(text: str) -> str:
    r"""The text that is stored and asked: NFC, ``\n`` line ends, no white space around it.

    >>> clean(" a\r\nb ")
    'a\nb'
    """
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").strip()


def normalise(text: str) -> str:
    """The text by which prompts are compared: NFKC, casefolded, every run of white space one space.

    >>> normalise("How  MANY?"), normalise("7+5=")
    ('how many?', '7+5=')
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_id(normalised: str) -> str:
    """32 hex digits over the normalised prompt."""
    return hashlib.sha256(normalised.encode()).hexdigest()[:FINGERPRINT_HEX]


def side_of(spelling: str, split: Split) -> Side:
    """The side of the split, from u in [0, 1) by a hash of a prompt's words (`words.spelled`): test below `test`, validation from the top.

    Test grows from the bottom and validation from the top, so a larger share keeps what a smaller one held out.
    """
    u = int.from_bytes(hashlib.sha256(b"split:" + spelling.encode()).digest()[:6], "big") / 2**48
    if u < split.test:
        return "test"
    return "validation" if u >= 1.0 - split.validation else "train"
