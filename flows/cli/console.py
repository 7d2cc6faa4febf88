"""What the command line shows while it works: live progress on a terminal, plain lines elsewhere; always on standard error.

Whatever takes a while is announced before it begins (``Display.step``), and before the packages that it needs are imported.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from flows.cli.terminal import printable

if TYPE_CHECKING:
    from kd_core.artifacts import Artifact
    from kd_core.progress import Tick, Ticker

__all__ = ["CleanConsole", "Display", "display", "human_bytes", "human_seconds"]

_SECONDS_BETWEEN_LINES = 30.0


def human_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> human_seconds(75.2), human_seconds(0.42), human_seconds(300_000)
    ('1 min 15 s', '0.4 s', '3 d 11 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
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


class _Either(ProgressColumn):
    """One column for work whose amount is known, another for other work; None is empty."""

    def __init__(self, counted: ProgressColumn | None, other: ProgressColumn | None) -> None:
        self._counted, self._other = counted, other
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> RenderableType:
        """The column's own text, or none."""
        column = self._other if task.total is None else self._counted
        return Text("") if column is None else column.render(task)


class _Note(ProgressColumn):
    """What a tick says beside its count: the one column that is cut where the line is too long."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> RenderableType:
        """One line."""
        return Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")


class Display:
    """A bar for each node that runs on a terminal, and a line when it is done anywhere. Nodes may be told of from several threads."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            _Either(BarColumn(bar_width=8), TimeElapsedColumn()),
            _Either(MofNCompleteColumn(), None),
            _Note(),
            console=console,
            transient=True,
            disable=not live,
        )
        self.live = live
        self._running: dict[str, _Running] = {}
        self._step: TaskID | None = None
        self._lock = threading.Lock()

    def step(self, text: str) -> None:
        """Say what is being done before, between or after nodes; on a terminal the next step or node takes its place."""
        with self._lock:
            self._end_step()
            if self.live:
                self._step = self.progress.add_task(escape(f"{text} ..."), total=None, note="")
            else:
                self.console.print(f"  {text} ...", highlight=False, markup=False, soft_wrap=True)

    def _end_step(self) -> None:
        if self._step is not None:
            self.progress.remove_task(self._step)
            self._step = None

    def start(self, name: str) -> None:
        """A node begins."""
        now = time.monotonic()
        with self._lock:
            self._end_step()
            self._running[name] = _Running(now, now)
            if self.live:
                self._running[name].bar = self.progress.add_task(f"{name:<15}", total=None, note="")

    def tick(self, name: str, tick: "Tick") -> None:
        """A node goes on."""
        now = time.monotonic()
        with self._lock:
            node = self._running.setdefault(name, _Running(now, now))
            if node.first is None:  # work that was found done is no speed
                node.first, node.began = tick.done, now
            rate = (tick.done - node.first) / max(now - node.began, 1e-6)
            left = f"{human_seconds((tick.total - tick.done) / rate)} left" if rate > 0 else ""
            how = tick.note or (f"{rate:.1f} {tick.unit}/s" if rate > 0 else "")
            said = [f"{tick.done}/{tick.total} {tick.unit}", left, how]
            if node.bar is not None:
                note = ", ".join(filter(None, said[1:])) or tick.unit
                self.progress.update(node.bar, completed=tick.done, total=tick.total, note=note)
            elif now - node.printed > _SECONDS_BETWEEN_LINES and tick.done < tick.total:
                node.printed = now
                self.console.print(f"{name:<15} {', '.join(filter(None, said))}", highlight=False, markup=False, soft_wrap=True)

    def work(self, name: str) -> "Ticker":
        """Begin a piece of work that is no node of a graph, in place of the one before; returns what hears of its progress."""
        with self._lock:
            for before in self._running.values():
                if before.bar is not None:
                    self.progress.remove_task(before.bar)
            self._running.clear()
        self.start(name)
        return partial(self.tick, name)

    def done(self, name: str, artifact: "Artifact") -> None:
        """A node is finished, or was found done."""
        with self._lock:
            self._end_step()
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
