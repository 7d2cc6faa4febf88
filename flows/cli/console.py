"""What the command line shows: live progress on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from flows.cli.terminal import printable
from kd_core.artifacts import Artifact
from kd_core.progress import Tick, Ticker

__all__ = ["CleanConsole", "Display", "display", "human_bytes", "human_seconds"]

_SECONDS_BETWEEN_LINES = 30.0


def human_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> human_seconds(75.2), human_seconds(0.42)
    ('1 min 15 s', '0.4 s')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def human_bytes(size: float) -> str:
    """Bytes for people.

    >>> human_bytes(3_420_000)
    '3.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass
class _Running:
    """A node on its way: when it began, what was done then, when a line last told of it, and its bar on a terminal."""

    began: float
    printed: float
    first: int | None = None
    bar: TaskID | None = None


class CleanConsole(Console):
    """A console that shows control characters in what it is given, and obeys its own alone."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of text to show, each printable."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(printable(piece.text), piece.style)


class Display:
    """A bar for each node that runs on a terminal, and a line when it is done anywhere. Nodes may be told of from several threads."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
        rest = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"))
        self.progress = Progress(*columns, *rest, console=console, transient=True, disable=not live)
        self.live = live
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()

    def start(self, name: str) -> None:
        """A node begins."""
        now = time.monotonic()
        with self._lock:
            self._running[name] = _Running(now, now)
            if self.live:
                self._running[name].bar = self.progress.add_task(f"{name:<15}", total=None, rate="", note="")

    def tick(self, name: str, tick: Tick) -> None:
        """A node goes on."""
        now = time.monotonic()
        with self._lock:
            node = self._running.setdefault(name, _Running(now, now))
            if node.first is None:  # work that was found done is no speed
                node.first, node.began = tick.done, now
            rate = (tick.done - node.first) / max(now - node.began, 1e-6)
            speed = f"{rate:.1f} {tick.unit}/s" if tick.done > node.first else tick.unit
            if node.bar is not None:
                self.progress.update(node.bar, completed=tick.done, total=tick.total, rate=speed, note=tick.note)
            elif now - node.printed > _SECONDS_BETWEEN_LINES and node.first < tick.done < tick.total:
                node.printed = now
                left = (tick.total - tick.done) / rate if rate > 0 else 0.0
                self.console.print(f"{name:<15} {tick.done}/{tick.total} {tick.unit}, {speed}, {human_seconds(left)} left", highlight=False)

    def work(self, name: str) -> Ticker:
        """Begin a piece of work that is no node of a graph, in place of the one before; returns what hears of its progress."""
        with self._lock:
            for before in self._running.values():
                if before.bar is not None:
                    self.progress.remove_task(before.bar)
            self._running.clear()
        self.start(name)
        return partial(self.tick, name)

    def done(self, name: str, artifact: Artifact) -> None:
        """A node is finished, or was found done."""
        with self._lock:
            node = self._running.pop(name, None)
            if node is not None and node.bar is not None:
                self.progress.remove_task(node.bar)
            mark, what = (
                ("[dim]=[/dim]", "[dim]already done[/dim]") if artifact.hit else ("[green]+[/green]", human_seconds(artifact.seconds))
            )
            self.console.print(f"{mark} {name:<17} [dim]{artifact.fingerprint[:12]}[/dim]  {what}", highlight=False)


@contextmanager
def display(*, quiet: bool) -> Iterator[Display]:
    """A display on standard error, so that standard output stays parseable.

    Args:
        quiet: print nothing but errors (for --json).
    """
    console = CleanConsole(stderr=True, quiet=quiet)
    shown = Display(console, live=console.is_terminal and not quiet and sys.stderr.isatty())
    with shown.progress:
        yield shown
