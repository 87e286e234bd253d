"""Interleaved timing: in each round every contender runs once, so that all of them meet the same machine."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from bench.kernels.case import Case, Contenders
from bench.kernels.stream import LOOPS, bandwidth
from bench.kernels.weights import DTYPES
from bench.report.results import Row
from rana_kernels import use_backend
from rana_kernels.system.cpu import clock

# Seconds. Shorter calls are repeated, until a turn takes about as long as a pass of a streaming loop.
SHORTEST = 5e-3
PEAK_SIZE = 1536  # of the square matrices whose product shows what the processor can compute
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Round:
    """Results of interleaved rounds: times by contender, and GB/s of the best streaming loop."""

    times: dict[str, Timing]
    stream: float


def measure(cases: Iterable[Case], backends: list[str], threads: list[int], rounds: int) -> Iterator[Row]:
    """Time every case, and yield one row of results for each case, backend and number of threads."""
    for case in cases:
        torch.manual_seed(0)
        contenders = case.contenders()
        for backend in backends:
            with use_backend(backend), torch.inference_mode():
                facts: Row = {
                    "case": case.name, "cost_ratio": round(case.cost_ratio, 3), "backend": backend,
                }  # fmt: skip
                facts |= {} if case.bits is None else {"bits": case.bits}
                error = f"{contenders.error():.1e}"
                for count in threads:
                    found = interleave(contenders.calls, count, rounds)
                    limits = {"error": error, "peak GFLOP/s": round(peak(case.dtype, count), 1)}
                    yield facts | {"threads": count} | row(found, contenders) | limits


def row(found: Round, contenders: Contenders) -> Row:
    """Return the columns of one measurement.

    `x dense` and its neighbours are how many times as fast as that baseline ours is. `% of stream` compares
    the weight bytes that ours must read, over its time, with the best streaming loop of the same rounds.
    """
    ours = found.times["rana"]
    gigabytes = contenders.bytes / ours.median / 1e3
    ratios = {f"x {name}": t.median / ours.median for name, t in found.times.items() if name != "rana"}
    return {
        "us": round(ours.median, 1),
        "p20": round(ours.p20, 1),
        "p80": round(ours.p80, 1),
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
        "GB/s": round(gigabytes, 2),
        "stream GB/s": round(found.stream, 1),
        "% of stream": round(100 * gigabytes / found.stream),
        "GFLOP/s": round(contenders.flops / ours.median / 1e3, 1),
    }


@cache
def peak(dtype: str, threads: int) -> float:
    """Return the GFLOP/s of torch's product of two square matrices, the median of a few."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE).to(DTYPES[dtype])
    with using(threads):
        seconds = [once(lambda: a @ a, threads, 1) for _ in range(6)][1:]
    return 2 * PEAK_SIZE**3 / statistics.median(seconds) / 1e9


def thread_counts() -> list[int]:
    """Return one, and as many as torch has."""
    return sorted({1, torch.get_num_threads()})


def interleave(contenders: dict[str, Callable[[], object]], threads: int, rounds: int) -> Round:
    """Time every contender `rounds` times on `threads` threads, in turns with the streaming loops.

    The best loop is chosen by its median, as contenders are judged by theirs.
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
    """Time every contender `rounds` times on `threads` threads, and call `between` after each round."""
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
    """Return how many calls in a row make a turn."""
    run()  # compiles, and starts its threads
    begin = time.perf_counter()
    run()
    return max(1, math.ceil(SHORTEST / (time.perf_counter() - begin)))


def once(run: Callable[[], object], threads: int, calls: int) -> float:
    """Return the seconds of a call, over `calls` calls in a row.

    The first call after another op's loop is about 70 µs slower, however short it is. During decode one op
    follows another, so where that delay shows, one untimed call goes first.
    """
    if calls > 1:
        run()
    now = clock(threads)
    begin = now()
    for _ in range(calls):
        run()
    return (now() - begin) / calls


def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Return the seconds of one call, and what it returned."""
    now = clock(torch.get_num_threads())
    begin = now()
    found = function(*arguments, **options)
    return now() - begin, found


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Capture `run` in a CUDA graph, and return its replay. Capturing computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def summary(seconds: list[float]) -> Timing:
    ordered = sorted(1e6 * s for s in seconds)
    at = lambda fraction: ordered[round(fraction * (len(ordered) - 1))]  # noqa: E731
    return Timing(at(0.5), at(0.2), at(0.8))
