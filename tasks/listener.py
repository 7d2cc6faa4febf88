"""Who hears of progress beside the orchestrator: the command line that started the run in its own process."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from kd_core.artifacts import Artifact
from kd_core.progress import Tick

__all__ = ["Listener", "current_listener", "listening"]


class Listener(Protocol):
    """Hears of nodes: begun, going on, done. Several may be on their way at once, and each may be told from a thread of its own."""

    def start(self, name: str) -> None:
        """A node begins."""

    def tick(self, name: str, tick: Tick) -> None:
        """A node goes on."""

    def done(self, name: str, artifact: Artifact) -> None:
        """A node is finished, or was found done."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def current_listener() -> Listener | None:
    """The listener of this context, or None under a worker."""
    return _listener.get()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear everything that runs in this context."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
