"""One call of ``kd``, from the environment to the exit code: errors become one line, never a traceback.

Exit codes: 0 done; 1 failed (or a doctor's finding); 2 bad input: the command, the recipe, its data, its store (where it
cannot be used at all; damage in it is a failure); 130 interrupted.
"""

import logging
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from typer.exceptions import TyperException

from flows.cli.app import app
from flows.cli.terminal import say
from kd_core.errors import KDError, RecipeError, SourceError, StoreAccessError

__all__ = ["run"]

_INTERRUPTED = 130
_TELLERS = (
    "kd_core.stages.run",
    "kd_core.stages.answers",
    "kd_core.teacher.server",
    "kd_core.teacher.classifiers",
    "kd_core.store.sealed",
    "kd_core.train.checkpoints",
)
"""Loggers whose warnings are shown: what was healed, passed over or left out."""


def run() -> NoReturn:
    """Run the command that was typed, and end the process."""
    _settle_environment()
    logging.getLogger("kd_core").addHandler(logging.NullHandler())  # a try that failed shows only in the error that ends them all
    for name in _TELLERS:
        logging.getLogger(name).handlers = [_Warnings(logging.WARNING)]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False, prog_name="kd")
        sys.stdout.flush()
        if code == _INTERRUPTED:  # typer turns an interrupt into this exit code
            raise KeyboardInterrupt
    except KDError as error:
        _fail(error, _exit_code(error))
    except KeyboardInterrupt:
        _stopped()
    except TyperException as error:  # wrong usage of the command line
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(f"{text}  (kd --help shows what there is)", 2)
    except BrokenPipeError:  # a reader that stops early, such as head: typer and rich end a command with 1 then, and without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        code = 1
    except Exception as error:
        if _ending or _is_interrupt(error):
            _stopped()
        _unexpected(error)
    sys.exit(code if isinstance(code, int) else 0)


def _exit_code(error: KDError) -> int:
    """2 where what was handed in is bad."""
    return 2 if isinstance(error, RecipeError | SourceError | StoreAccessError) else 1


class _Warnings(logging.Handler):
    """One line each, to whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        say(f"kd: {record.getMessage()}", file=sys.stderr)


def _settle_environment() -> None:
    """Quiet, offline-friendly defaults for libraries; whatever the user has set stays."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "svg",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


_ending: list[int] = []
"""Signals that asked this process to end. What breaks after one is its doing: a temporary server of the same group hears it too."""


def _terminated(number: int, _: object) -> NoReturn:
    _ending.append(number)
    raise KeyboardInterrupt


def _fail(message: object, code: int) -> NoReturn:
    say(f"kd: {message}", file=sys.stderr)
    sys.exit(code)


def _stopped() -> NoReturn:
    _fail(f"stopped. Everything that was finished is kept; go on with:  {shlex.join(['kd', *sys.argv[1:]])}", _INTERRUPTED)


def _is_interrupt(error: BaseException | None) -> bool:
    """Tell whether an error stands for an interrupt: a lazy import of transformers turns one into a ModuleNotFoundError."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_interrupt(error.__cause__ or error.__context__))


def _unexpected(error: Exception) -> NoReturn:
    """A defect of ours, or of the machine: one line, with the traceback in a file."""
    import traceback

    from kd_core.store.local import make_directory

    text = "".join(traceback.format_exception(error))
    log = Path(".kd/last-error.log")
    try:
        make_directory(log.parent)
        log.write_text(text, encoding="utf-8")
    except OSError:  # the working directory cannot be written, or is gone
        with tempfile.NamedTemporaryFile("w", prefix="kd-error-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(text)
        log = Path(file.name)
    _fail(f"{type(error).__name__}: {error}\nThis is a defect or a broken machine, not your recipe; the traceback is in {log}", 1)
