"""The way of text to a terminal: without signs that a terminal obeys, and without passwords.

Names, prompts, descriptions and the words of servers come from others: an escape sequence in them could move the cursor,
hide a line or answer for the user. They are shown as what they are, for example \\x1b.
"""

import re
import sys
from typing import TextIO

__all__ = ["printable", "say"]

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of writing."""


def printable(text: str) -> str:
    r"""Text with its control characters spelt out.

    >>> print(printable("\x1b[2Jgone"))
    \x1b[2Jgone
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print text for people; to standard output if no file is given."""
    from kd_core.recipe.addresses import hide_passwords  # with all of pydantic: half a second, which a first line need not wait for

    print(printable(hide_passwords(str(text))), file=file or sys.stdout)
