"""SIGTERM that waits: work in steps ends at the next step's end, with what it has saved, and not in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Stop", "sigterm_waits"]


@dataclass
class Stop:
    """Note of whether SIGTERM has come."""

    requested: bool = False


@contextmanager
def sigterm_waits() -> Iterator[Stop]:
    """Note SIGTERM in the block and hand it on at its end, to whoever handled it before; a second one is handed on at once.

    Outside of the main thread, where Python sets no handlers, nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def note(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            signal.signal(number, before)
            signal.raise_signal(number)
        stop.requested = True

    signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        if stop.requested:
            signal.raise_signal(signal.SIGTERM)
