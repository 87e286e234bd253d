"""Timing on a card: CUDA graphs that are replayed in turns, and the limits of the card in torch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.baselines import DTYPES

DEVICE = "cuda"
CALLS = 32  # of a graph, at least, so that its own start does not count
Call = Callable[[], Tensor]


def graph(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """Capture a graph that repeats the calls, and return it with its number of calls."""
    for call in calls:  # compiles, and warms the libraries up
        call()
    torch.cuda.synchronize()
    captured, rounds = torch.cuda.CUDAGraph(), math.ceil(CALLS / len(calls))
    with torch.cuda.graph(captured):
        for call in calls * rounds:
            call()
    return captured, rounds * len(calls)


def microseconds(contenders: dict[str, list[Call]], rounds: int = 15) -> dict[str, list[float]]:
    """Return the sorted microseconds a call of each contender, one a round. Contenders take turns."""
    graphs = {name: graph(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(1 + rounds):
        for name, (captured, calls) in graphs.items():
            begin.record()
            captured.replay()
            end.record()
            end.synchronize()
            times[name].append(1e3 * begin.elapsed_time(end) / calls)
    return {name: sorted(values[1:]) for name, values in times.items()}


def bandwidths() -> tuple[float, float]:
    """Return the best GB/s of torch on 1 GiB: of a copy (bytes read and written), and of a read."""
    source = torch.ones(2**28, device=DEVICE)
    target = torch.empty_like(source)
    times = microseconds({"copy": [lambda: target.copy_(source)], "read": [lambda: source.sum()]})
    return 2 * source.nbytes / times["copy"][0] / 1e3, source.nbytes / times["read"][0] / 1e3


def peak(dtype: str) -> float:
    """Return the GFLOP/s of a product of two large square matrices."""
    a = torch.randn(8192, 8192, device=DEVICE).to(DTYPES[dtype])
    return 2 * len(a) ** 3 / microseconds({"product": [lambda: a @ a]})["product"][0] / 1e3
