"""Places that a run needs: directories that can be written, addresses at which something answers. Asked without leaving a trace."""

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["refusal", "unreachable", "unwritable"]

_SECONDS = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def unwritable(directory: Path) -> str | None:
    """Why nothing can be written below a directory, which need not be there yet; None where it can."""
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place):  # without a name, where the file system can do that
            return None
    except OSError as error:
        return f"{place}: {error.strerror or error}"


def refusal(url: str, *, headers: Mapping[str, str]) -> str | None:
    """Why an HTTP server does not serve us: it cannot be reached, is broken, or wants another key; None where it answers.

    An answer that there is no such page, or no such method, is one: not every server has the page that is asked for.
    """
    import httpx

    try:
        status = httpx.get(url, headers=dict(headers), timeout=_SECONDS).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    if status in (401, 403):
        return f"it answers {status}: the credentials are wrong, or not set"
    return f"it answers {status}" if status >= 500 and status != 501 else None


def unreachable(database: str) -> str | None:
    """Why a database server cannot be reached; None where it can, or where the address names none."""
    parts = urlsplit(database)
    if parts.hostname is None:
        return None
    try:
        port = parts.port or _PORTS.get(parts.scheme.partition("+")[0])
        if port is not None:
            socket.create_connection((parts.hostname, port), timeout=_SECONDS).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None
