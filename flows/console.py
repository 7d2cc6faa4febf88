"""What the command line shows: live progress on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from flows.terminal import printable
from kd_core.artifacts import Artifact
from kd_core.progress import Tick

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


class CleanConsole(Console):
    """A console that shows control characters in what it is given, and obeys its own alone."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of text to show, each printable."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(printable(piece.text), piece.style)


class Display:
    """One line a node: a bar while it runs on a terminal, a line when it is done anywhere."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn())
        rest = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"))
        self.progress = Progress(*columns, *rest, console=console, transient=True, disable=not live)
        self.live, self.bar, self.name = live, None, ""
        self.began = self.printed = time.monotonic()
        self.first = 0

    def start(self, name: str) -> None:
        """A node begins."""
        self.finish_bar()
        self.name, self.began, self.printed, self.first = name, time.monotonic(), time.monotonic(), -1

    def tick(self, tick: Tick) -> None:
        """Progress of the current node."""
        now = time.monotonic()
        if self.first < 0:
            self.first, self.began = tick.done, now
        rate = (tick.done - self.first) / max(now - self.began, 1e-6)
        speed = f"{rate:.1f} {tick.unit}/s" if tick.done > self.first else tick.unit
        if self.live:
            if self.bar is None:
                self.bar = self.progress.add_task(f"{self.name:<15}", total=tick.total, rate="", note="")
            self.progress.update(self.bar, completed=tick.done, total=tick.total, rate=speed, note=tick.note)
        elif now - self.printed > _SECONDS_BETWEEN_LINES and self.first < tick.done < tick.total:
            self.printed = now
            left = (tick.total - tick.done) / rate if rate > 0 else 0.0
            self.console.print(
                f"{self.name:<15} {tick.done}/{tick.total} {tick.unit}, {speed}, {human_seconds(left)} left", highlight=False
            )

    def done(self, artifact: Artifact) -> None:
        """The current node is finished."""
        self.finish_bar()
        mark, what = ("[dim]=[/dim]", "[dim]already done[/dim]") if artifact.hit else ("[green]+[/green]", human_seconds(artifact.seconds))
        self.console.print(f"{mark} {self.name:<17} [dim]{artifact.fingerprint[:12]}[/dim]  {what}", highlight=False)

    def finish_bar(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.progress.remove_task(self.bar)
            self.bar = None


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
