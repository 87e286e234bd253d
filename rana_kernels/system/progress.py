"""The progress of long work: a bar with the time left on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

import rich
from rich.progress import Progress

EVERY = 10.0  # seconds
T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """Give the items, and show how many of them are done unless `show` is false."""
    total = len(items) if isinstance(items, Sized) else None
    with meter(what, total, show) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def meter(what: str, total: int | None, show: bool, done: int = 0) -> Iterator[Callable[..., None]]:
    """Give a function to call after every step. Its argument, if any, is what `what` has become.

    done   steps of an earlier run
    """
    console = rich.get_console()
    if not show:
        yield lambda what="": None
    elif console.is_terminal or console.is_jupyter:
        with Progress(transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda what=None: bar.update(task, advance=1, description=what)
    else:
        yield _Lines(what, total, done).advance


class _Lines:
    """Progress as lines on stderr, for logs. Work of less than ten seconds writes none."""

    def __init__(self, what: str, total: int | None, done: int) -> None:
        self.what, self.total, self.done, self.before = what, total, done, done
        self.started = self.written = time.monotonic()

    def advance(self, what: str | None = None) -> None:
        self.done, self.what = self.done + 1, what or self.what
        now = time.monotonic()
        if now - self.written >= EVERY:
            self.written = now
            print(self._line(now - self.started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        if self.total is None:
            return f"{self.what}: {self.done} in {duration(seconds)}"
        left = (self.total - self.done) * seconds / (self.done - self.before)
        return f"{self.what}: {self.done} of {self.total}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """Return a time in words: "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
