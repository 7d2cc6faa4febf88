r"""The child's program of symbolic.py: a JSON line in, one line 'right', 'wrong' or 'undecided' out.

A line is [CPU seconds, [kind, left, right]]. LaTeX is read by math-verify's parser (latex2sympy). Constants are compared
exactly where they are rational, else to 50 digits, relative to their size; expressions in variables by their values at
points, to 50 digits. Functions that are not known by value are left to math-verify. Imports nothing of this project.
"""

import ctypes
import itertools
import json
import logging
import os
import re
import signal
import sys
from functools import lru_cache
from typing import Any

__all__: list[str] = []

LIMIT_BYTES = 3 << 30
LIMIT_DIGITS = 20_000
LIMIT_SYMBOLS = 12
DIGITS = 50
TOLERANCE_DIGITS = 6
_POINTS = ((3, 7), (-5, 11), (13, 17), (-19, 23), (29, 5))


def _limit_memory_and_life() -> None:
    """Linux: bound the memory, and die with the thread that started this process."""
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


class UndecidedError(Exception):
    """Raised where values cannot be compared."""


def _serve() -> None:
    _limit_memory_and_life()
    import math_verify  # noqa: F401  # so that a missing package is told at the start

    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    print("ready", file=replies)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # parsers print what they think of an input; only replies may reach the pipe
    os.dup2(silence, 2)
    for line in sys.stdin:
        seconds, (kind, left, right) = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time; the signal's default ends the process, whatever it is at
        try:
            verdict = (_formulas if kind == "formulas" else _equations)(left, right)
        except Exception:  # parsers and solvers raise anything on garbage, MemoryError and RecursionError included
            verdict = "undecided"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies)


@lru_cache(maxsize=1 << 12)
def _parsed(latex: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Expr, Float, I, Pow, Rational, Symbol

    normalise = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    found = latex2sympy(latex, normalization_config=normalise, conversion_config=ConversionConfig(lowercase_symbols=False))
    if not isinstance(found, Expr):
        raise UndecidedError
    exact = {number: Rational(str(number)) for number in found.atoms(Float)}
    if Symbol("i") in found.free_symbols:
        exact[Symbol("i")] = I
    found = found.xreplace(exact)
    _check_size(found)
    found = found.doit()
    odd = {power: -Pow(-power.base, power.exp) for power in found.atoms(Pow) if power.base.is_negative and _is_odd_root(power.exp)}
    return found.xreplace(odd)


def _is_odd_root(exponent: Any) -> bool:
    """Whether an exponent is 1/3, 1/5 ...: of a negative number the real root is meant, not sympy's complex one."""
    return bool(exponent.is_Rational and exponent.p == 1 and exponent.q % 2 == 1 and exponent.q > 1)


def _check_size(found: Any) -> None:
    """Refuse what would have too many digits to be written out."""
    from sympy import Pow, factorial, log

    for power in found.atoms(Pow):
        base, exponent = power.args
        if exponent.is_number and exponent.atoms(Pow):
            _check_size(exponent)
        if base.is_number and exponent.is_number:
            size = abs(exponent.evalf(15)) * (abs(log(abs(base.evalf(15)) + 2)) / 2.3)
            if not size < LIMIT_DIGITS:
                raise UndecidedError
    for call in found.atoms(factorial):
        if call.args[0].is_number and not abs(call.args[0].evalf(15)) < 5_000:
            raise UndecidedError


def _value(sent: list[str]) -> tuple[Any, int | None]:
    """A value and the digits it is rounded to, None where it is exact."""
    from sympy import Rational

    if sent[0] == "number":
        return Rational(sent[1]), int(sent[3]) if sent[2] == "decimal" else None
    decimals = [len(found.replace(".", "").lstrip("0")) for found in re.findall(r"[0-9]*\.[0-9]+", sent[1])]
    return _parsed(sent[1]), max(decimals, default=None)


def _formulas(left: list[str], right: list[str]) -> str:
    (a, a_digits), (b, b_digits) = _value(left), _value(right)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if symbols:
        return _equal_at_points(a, b, symbols)
    if _equal(a, b):
        return "right"
    if (a_digits is None) == (b_digits is None):
        return "wrong"
    rounded, exact, digits = (a, b, a_digits) if a_digits is not None else (b, a, b_digits)
    assert digits is not None, "one of the two is a decimal"
    return "right" if _is_rounded(rounded, exact, digits) else "wrong"


def _equal(a: Any, b: Any) -> bool:
    """Whether two constants are equal: exactly if rational, else to 50 digits relative to the larger."""
    from sympy import Rational, nan, oo, zoo

    if nan in (a, b) or zoo in (a, b):
        raise UndecidedError
    if a == b:
        return True
    if a in (oo, -oo) or b in (oo, -oo) or (isinstance(a, Rational) and isinstance(b, Rational)):
        return False
    x, y = _number(a), _number(b)
    return bool(abs(x - y) <= Rational(10) ** (10 - DIGITS) * max(abs(x), abs(y)))


def _number(value: Any) -> Any:
    """A constant to 50 digits; a part of it that keeps no digit in 1,000 is zero."""
    from sympy import I, Integer

    parts = value.evalf(DIGITS, maxn=1000).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        raise UndecidedError
    real, imaginary = (Integer(0) if part.is_Float and part._prec <= 1 else part for part in parts)
    return real + I * imaginary


def _is_rounded(rounded: Any, exact: Any, digits: int) -> bool:
    """Whether a decimal is within 1e-6 of an exact value that needs more digits than it has."""
    from sympy import Rational

    if isinstance(exact, Rational):
        scaled = abs(exact) * Rational(10) ** exact.q.bit_length()
        whole = int(scaled) if scaled.q == 1 else 10**digits
        while whole and whole % 10 == 0:
            whole //= 10
        if scaled.q == 1 and whole < 10**digits:
            return False
    x, y = _number(rounded), _number(exact)
    return bool(abs(x - y) <= abs(y) * 10**-TOLERANCE_DIGITS * (1 + 10**-20))


def _points(symbols: list[Any]) -> list[dict[Any, Any]]:
    from sympy import Rational

    if len(symbols) > LIMIT_SYMBOLS:
        raise UndecidedError
    return [
        {symbol: Rational(over + 31 * i * (1 if over > 0 else -1), under + 2 * i) for i, symbol in enumerate(symbols)}
        for over, under in _POINTS
    ]


def _equal_at_points(a: Any, b: Any, symbols: list[Any]) -> str:
    from sympy.core.function import AppliedUndef

    if a == b:
        return "right"
    if a.atoms(AppliedUndef) or b.atoms(AppliedUndef):
        return _left_to_math_verify(a, b)
    defined = 0
    for point in _points(symbols):
        try:
            equal = _equal(a.subs(point), b.subs(point))
        except UndecidedError:
            continue
        if not equal:
            return "wrong"
        defined += 1
    return "right" if defined >= 2 else _left_to_math_verify(a, b)


def _left_to_math_verify(a: Any, b: Any) -> str:
    from math_verify import verify

    both = (verify(a, b, timeout_seconds=None), verify(b, a, timeout_seconds=None))
    return "right" if all(both) else "undecided"


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def _equations(left: list[str], right: list[str]) -> str:
    """Compare 'left side - right side' of two relations: equal up to a constant factor, a negative one turns inequalities."""
    a, b = (_parsed(sides[0]) - _parsed(sides[2]) for sides in (left, right))
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.free_symbols != b.free_symbols or not symbols:
        return "wrong" if symbols else "undecided"
    ratios = []
    for point in _points(symbols):
        x, y = _number(a.subs(point)), _number(b.subs(point))
        if abs(y) > 10**-20:
            ratios.append(x / y)
    if len(ratios) < 2:
        return "undecided"
    if not all(_equal(one, other) for one, other in itertools.pairwise(ratios)):
        return _solved(a, b) if left[1] == right[1] == "=" else "undecided"
    operator = right[1] if ratios[0].as_real_imag()[0] > 0 else _FLIPPED[right[1]]
    return "right" if left[1] == operator and ratios[0].is_real else "wrong"


def _solved(a: Any, b: Any) -> str:
    from math_verify import verify
    from sympy import Eq

    one, other = Eq(a, 0, evaluate=False), Eq(b, 0, evaluate=False)
    both = (verify(one, other, timeout_seconds=None), verify(other, one, timeout_seconds=None))
    return "right" if all(both) else "wrong"


if __name__ == "__main__":
    _serve()
