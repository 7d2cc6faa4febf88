"""Equality of mathematical answers beyond plain numbers: math-verify in a child process that can be killed.

math-verify guards itself with signal.alarm, which only works in a main thread, and an alarm does not interrupt one long
operation on big integers: '9^{9^{9^9}}' would hold a stage for ever. So the parent, from any thread, asks a child
(symbolic_child.py) and kills it after LIMIT_SECONDS. What cannot be decided within its limits is not equal.
"""

import atexit
import json
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from kd_core.errors import KDError

__all__ = ["LIMIT_SECONDS", "symbolic_equal"]

LIMIT_SECONDS = 5.0
_START_SECONDS = 120.0
_PROGRAM = Path(__file__).with_name("symbolic_child.py")


class _Child:
    """One math-verify process, started when first needed and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: str, reference: str) -> bool:
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            reply = b""
            with suppress(BrokenPipeError):  # it died since the last question: no reply, and a new one next time
                process.stdin.write(json.dumps([answer, reference]).encode() + b"\n")
                process.stdin.flush()
                reply = _read_line(process, LIMIT_SECONDS)
            if not reply:
                self.stop()
            return reply == b"true\n"

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-W", "ignore", str(_PROGRAM)]
        process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.stop)
        if _read_line(process, _START_SECONDS) != b"ready\n":
            self.stop()
            raise KDError("the verifier's process did not start; its own error stands above; check that `import math_verify` works")
        return process

    def stop(self) -> None:
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with suppress(BrokenPipeError):
                    stream.close()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else b""


_child = _Child()


def symbolic_equal(answer: str, reference: str) -> bool:
    """Whether math-verify finds two answers equal, within LIMIT_SECONDS; garbage is not equal.

    Args:
        answer: what is judged: LaTeX, plain mathematics, or prose that holds it.
        reference: what it must equal.

    Raises:
        KDError: math-verify cannot be started at all.
    """
    return _child.ask(answer, reference)
