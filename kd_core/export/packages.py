"""Optional packages of the export: found or named, and kept from talking over our own output."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

from kd_core.errors import KDError

__all__ = ["hushed", "require_packages"]


def require_packages(packages: tuple[str, ...], *, wanted_by: str) -> None:
    """Assert that optional packages are installed.

    Raises:
        KDError: some are not; the message is the command that installs them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise KDError(f"{wanted_by} needs {', '.join(missing)}, which is not installed here; run:  pip install {' '.join(missing)}")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No bars, warnings and log lines of the packages that convert; their errors still rise."""
    transformers_logging.disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
