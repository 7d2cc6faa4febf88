"""Equality of single formulas and equations: sympy in a child process with limits on its CPU time and memory.

One operation on big integers cannot be interrupted in the process it runs in: '9^{9^{9^9}}' would hold a stage for ever.
So the parent, from any thread, asks a child (symbolic_child.py), whose own timer kills it after LIMIT_CPU_SECONDS of CPU
time: a busy machine changes no verdict. The child dies with its parent.
"""

import atexit
import json
import queue
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kd_core.curate.forms import Formula
from kd_core.curate.numbers import Number
from kd_core.errors import KDError

__all__ = ["LIMIT_CPU_SECONDS", "compare_equations", "compare_formulas"]

LIMIT_CPU_SECONDS = 10.0
"""CPU time of one question."""
_BACKSTOP_SECONDS = 3600.0
"""Wall clock after which a child that neither answers nor uses CPU time is given up."""
_PROGRAM = Path(__file__).with_name("symbolic_child.py")
_OWN_LIMITS = {-signal.SIGPROF, -signal.SIGSEGV, -signal.SIGABRT}

_Verdict = Literal["right", "wrong", "undecided"]
_VERDICTS: dict[bytes, _Verdict] = {b"right\n": "right", b"wrong\n": "wrong", b"undecided\n": "undecided"}


class _Child:
    """One process, started when first needed and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: object) -> _Verdict:
        line = json.dumps([LIMIT_CPU_SECONDS, question]).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # one that somebody else killed is replaced once
                process = self._process or self._start()
                assert process.stdin is not None
                reply = b""
                with suppress(BrokenPipeError):
                    process.stdin.write(line)
                    process.stdin.flush()
                    reply = _read_line(process)
                if reply in _VERDICTS:
                    return _VERDICTS[reply]
                if self.stop() in _OWN_LIMITS:
                    break
            return "undecided"

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process = _spawn()
        atexit.register(self.stop)
        if _read_line(process) != b"ready\n":
            self.stop()
            raise KDError("the verifier's process did not start; its own error stands above; check that `import math_verify` works")
        return process

    def stop(self) -> int | None:
        """End the process; return its exit status, which is negative where a signal had ended it before."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)  # at the end of its input it ends, unless it is at work
        process.kill()
        process.stdout.close()
        return process.wait()


def _spawn() -> subprocess.Popen[bytes]:
    """Start the child from a thread that lives as long as it does: Linux kills it when the thread that started it ends."""
    started: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()

    def keep() -> None:
        try:
            process = subprocess.Popen([sys.executable, "-P", "-W", "ignore", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            started.put(error)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=keep, name="verifier", daemon=True).start()
    process = started.get()
    if isinstance(process, OSError):
        raise KDError(f"the verifier's process cannot be started: {process}; check the limits on processes and memory") from process
    return process


def _read_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _BACKSTOP_SECONDS)
    return process.stdout.readline() if ready else b""


_child = _Child()


def compare_formulas(left: Number | Formula, right: Number | Formula) -> _Verdict:
    """Whether two values are equal; a decimal equals what it is rounded from within 1e-6 of that.

    Raises:
        KDError: the child cannot be started at all.
    """
    return _ask("formulas", *sorted((_sent(left), _sent(right))))


def compare_equations(left: tuple[str, str, str], right: tuple[str, str, str]) -> _Verdict:
    r"""Whether two relations (left side, operator, right side) are the same up to a constant factor.

    Raises:
        KDError: the child cannot be started at all.
    """
    return _ask("equations", *sorted((left, right)))


@lru_cache(maxsize=1 << 14)
def _ask(kind: str, left: tuple[str, ...], right: tuple[str, ...]) -> _Verdict:
    return _child.ask([kind, left, right])


def _sent(value: Number | Formula) -> tuple[str, ...]:
    """LaTeX, or an exact fraction and how it was written."""
    if isinstance(value, Formula):
        return ("formula", value.latex)
    exact = value.value / 100 if value.percent else value.value
    return ("number", str(Fraction(exact)), value.form, str(value.digits))
