"""Interleaved timing: in each round every contender runs once, so that all of them meet the same machine."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from bench.stream import LOOPS, bandwidth
from rana_kernels.system.cpu import clock

# Seconds; what takes less is called several times in a row, about as long as a pass of the streaming loops.
SHORTEST = 5e-3
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Round:
    """What one set of interleaved rounds measured: times by contender, and the best loop's GB/s."""

    times: dict[str, Timing]
    stream: float


def thread_counts() -> list[int]:
    """One, and all that torch has."""
    return sorted({1, torch.get_num_threads()})


def interleave(contenders: dict[str, Callable[[], object]], threads: int, rounds: int) -> Round:
    """Time every contender `rounds` times on `threads` threads, taking turns with the streaming loops.

    The yardstick is the best loop by its median, as the contenders are judged by theirs.
    """
    streams: dict[str, list[float]] = {loop: [] for loop in LOOPS}

    def stream() -> None:
        for loop in LOOPS:
            streams[loop].append(bandwidth(loop, threads))

    times = alternate(contenders, threads, rounds, between=stream)
    return Round(times, max(statistics.median(values[1:]) for values in streams.values()))


def alternate(
    contenders: Mapping[Name, Callable[[], object]],
    threads: int,
    rounds: int,
    between: Callable[[], None] = lambda: None,
) -> dict[Name, Timing]:
    """Time every contender `rounds` times on `threads` threads; `between` is called after each round."""
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    with using(threads):
        calls = {name: repeats(run) for name, run in contenders.items()}
        for _ in range(1 + rounds):  # the first round warms up
            for name, run in contenders.items():
                seconds[name].append(once(run, threads, calls[name]))
            between()
    return {name: summary(values[1:]) for name, values in seconds.items()}


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def repeats(run: Callable[[], object]) -> int:
    """How many calls in a row make a turn."""
    run()  # compiles, and finds its threads
    begin = time.perf_counter()
    run()
    return max(1, math.ceil(SHORTEST / (time.perf_counter() - begin)))


def once(run: Callable[[], object], threads: int, calls: int) -> float:
    """Seconds a call, of so many in a row.

    The first call after another's loop is some 70 µs slower, whatever its length, and decode goes from op to
    op: where that shows, one call goes before, untimed.
    """
    if calls > 1:
        run()
    now = clock(threads)
    begin = now()
    for _ in range(calls):
        run()
    return (now() - begin) / calls


def summary(seconds: list[float]) -> Timing:
    ordered = sorted(1e6 * s for s in seconds)
    at = lambda fraction: ordered[round(fraction * (len(ordered) - 1))]  # noqa: E731
    return Timing(at(0.5), at(0.2), at(0.8))
