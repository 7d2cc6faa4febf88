"""Child processes of a run: they end with their parent, and how one ended is told in words."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

__all__ = ["end_with_parent", "how_it_ended"]


def end_with_parent() -> None:
    """Watch the parent from a thread of this child process, and end at once when it is gone, however it went."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "only a child process has somebody to watch"
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def how_it_ended(exit_code: int) -> str:
    """A process's end in words.

    >>> how_it_ended(-9), how_it_ended(1)
    ('was killed by SIGKILL', 'ended with exit code 1')
    """
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
