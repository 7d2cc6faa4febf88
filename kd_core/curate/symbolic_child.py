r"""The child's program of symbolic.py: JSON lines [answer, reference] in, one line true or false out.

Owns how a text is read. Without delimiters a text is one formula, so '- 16' is not 16 and '2\frac{1}{3}' is not 1/3;
prose, and what is too long for a formula, is left to math-verify, which searches it for its last formula or number.
Imports nothing of this project.
"""

import json
import logging
import os
import re
import sys

__all__ = ["readings"]

LIMIT_BYTES = 3 << 30
LIMIT_FORMULA_CHARACTERS = 1000

_DELIMITED = re.compile(r"\$|\\boxed|\\\[|\\\(")
_PROSE = re.compile(r"[A-Za-z]{2,}[\s,;:]+[A-Za-z]{2,}")
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")


def readings(text: str) -> list[str]:
    r"""The forms in which math-verify is shown a text, until one of them parses.

    >>> readings("\\frac{1}{2}")[0], readings("The answer is 16.")
    ('\\boxed{\\frac{1}{2}}', ['The answer is 16.'])
    """
    if len(text) > LIMIT_FORMULA_CHARACTERS or _DELIMITED.search(text) or _PROSE.search(_COMMANDS.sub(" ", text)):
        return [text]
    return [f"\\boxed{{{text}}}", text]


def _serve() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    from math_verify import parse, verify

    def parsed(text: str) -> list[object]:
        found: list[object] = []
        for reading in readings(text):
            found = parse(reading, parsing_timeout=None)
            if any(not isinstance(item, str) for item in found):
                break
        return found

    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    print("ready", file=replies)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # parsers print what they think of an input; only replies may reach the pipe
    os.dup2(silence, 2)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        try:
            equal = verify(parsed(reference), parsed(answer), timeout_seconds=None)
        except Exception:  # parsers and solvers raise anything on garbage, MemoryError and RecursionError included
            equal = False
        print("true" if equal else "false", file=replies)


if __name__ == "__main__":
    _serve()
