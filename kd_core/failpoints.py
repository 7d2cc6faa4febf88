"""Named points at which a test can break the program: ``KD_FAILPOINT=name:nth:action``.

Owns fault injection for kill-and-resume tests. Without the environment variable a point costs one dictionary look-up.
Actions: ``kill`` (SIGKILL to this process, as the machine would), ``term`` (SIGTERM, as a scheduler would), ``error`` (an OSError) and
``hold=FOLDER``: leave a file named by the process id there and wait until somebody removes it, so that a test can act on a run that is
certainly not over.
"""

import os
import signal
import time
from collections import Counter
from pathlib import Path

__all__ = ["reach"]

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Pass a named point; break here if the environment says so.

    Raises:
        OSError: under action 'error', at the nth passage.
    """
    wanted = os.environ.get("KD_FAILPOINT")
    if not wanted:
        return
    point, nth, action = wanted.split(":", 2)
    if point != name:
        return
    _reached[name] += 1
    if _reached[name] != int(nth):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.startswith("hold="):
        held = Path(action.removeprefix("hold=")) / str(os.getpid())
        held.touch()
        while held.exists():
            time.sleep(0.02)
        return
    if action == "term":
        return signal.raise_signal(signal.SIGTERM)
    raise OSError(f"fail point {wanted}")
