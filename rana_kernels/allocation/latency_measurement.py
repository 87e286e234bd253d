"""The measurement of a LatencyTable: the modules of a compressed model run one token, with random weights.

Each weight has one copy for every block of the model, or fewer if these already exceed the caches. The copies
are used in turn, so the caches help as much as they do in the model. The candidates are timed in turn too.
Live rows lie in random places.
"""

import math
import statistics
import time
from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.allocation.latency import LatencyTable, ShapeLatency, sizes_of
from rana_kernels.model.admission import admit
from rana_kernels.model.architectures import find_blocks
from rana_kernels.model.linears import linear_of
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear
from rana_kernels.nn.base import fill_module
from rana_kernels.nn.dense import DenseLinear
from rana_kernels.system.cpu import clock, cold_bytes, processor_name
from rana_kernels.system.huge_pages import collapse
from rana_kernels.system.progress import track

# Measured sizes: these parts of all ranks are stored, and of the stored rows these parts are live.
PARTS = (0.25, 0.5, 1.0)
ROUNDS = 15  # the time is the median over the rounds
SHORTEST = 1e-3  # seconds: a shorter call is repeated, and the repeats are timed together
FAR = 1e30  # a threshold that no score reaches
Run = Callable[[], object]


def measure_latency(model: nn.Module, progress: bool = True) -> LatencyTable:
    """Time every way to adapt the linears of `model`'s blocks.

    The times hold for the device and dtype of `model` and for the threads that torch has now. A shape takes
    about a second. Nothing else should run on the machine meanwhile.
    """
    model = admit(model, changes=False)
    blocks = find_blocks(model)
    weight = linear_of(model, blocks[0].linears[0]).weight
    sizes = track(sizes_of(model, blocks), "timing", progress)
    shapes = [_measure(K, N, len(blocks), weight) for K, N in sizes]
    return LatencyTable(_machine(weight), tuple(shapes))


def _machine(weight: Tensor) -> dict[str, Any]:
    on_card = weight.device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(weight.device) if on_card else processor_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }  # fmt: skip


@torch.inference_mode()
def _measure(K: int, N: int, blocks: int, like: Tensor) -> ShapeLatency:
    copies = min(blocks, math.ceil(cold_bytes() / (K * N * like.element_size())))
    ranks = sorted({max(1, round(part * min(K, N))) for part in PARTS})
    rank_sizes = [(R, max(1, round(part * R))) for R, part in product(ranks, PARTS)]
    neuron_live = [max(1, round(part * K)) for part in PARTS]
    # an adapter of R ranks uses the first R rows of the largest one
    B, rows, W = (_copies(like, copies, *size) for size in ((ranks[-1], K), (ranks[-1], N), (K, N)))
    x = torch.randn(1, K, dtype=like.dtype, device=like.device)
    runs = [_in_turn([_dense(w.view(N, K)) for w in W], x)]
    for R, live in rank_sizes:
        made = (_rank(b[:R], r[:R], _threshold(R, live, like)) for b, r in zip(B, rows, strict=True))
        runs.append(_in_turn(list(made), x))
    runs += [_in_turn([_neuron(w, _threshold(K, live, like)) for w in W], x) for live in neuron_live]
    dense, *found = _medians(runs, like.device)
    ranks_us, neurons_us = found[: len(rank_sizes)], found[len(rank_sizes) :]
    return ShapeLatency(
        K, N, dense,
        tuple((float(R), float(live), us) for (R, live), us in zip(rank_sizes, ranks_us, strict=True)),
        tuple((float(K), float(live), us) for live, us in zip(neuron_live, neurons_us, strict=True)),
    )  # fmt: skip


def _copies(like: Tensor, count: int, *size: int) -> list[Tensor]:
    first = torch.randn(size, dtype=like.dtype, device=like.device) / size[-1] ** 0.5
    made = [first, *(first.clone() for _ in range(count - 1))]
    collapse(made)  # the weights of a compressed model lie in huge pages too
    return made


def _threshold(stored: int, live: int, like: Tensor) -> Tensor:
    threshold = torch.full((stored,), FAR, device=like.device)
    threshold[torch.randperm(stored, device=like.device)[:live]] = 0
    return threshold


def _dense(weight: Tensor) -> nn.Module:
    N, K = weight.shape
    return fill_module(DenseLinear(K, N, False, device="meta"), weight=weight)


def _rank(B: Tensor, rows: Tensor, threshold: Tensor) -> nn.Module:
    made = RanaLinear(B.shape[1], rows.shape[1], len(B), device="meta", dtype=B.dtype)
    return fill_module(made, B=B, rows=rows, threshold=threshold)


def _neuron(rows: Tensor, threshold: Tensor) -> nn.Module:
    made = RanaNeuronLinear(*rows.shape, device="meta", dtype=rows.dtype)
    return fill_module(made, rows=rows, norms=torch.ones_like(threshold), threshold=threshold)


def _in_turn(modules: list[nn.Module], x: Tensor) -> Run:
    following = cycle(modules)
    return lambda: next(following)(x)


def _medians(runs: list[Run], device: torch.device) -> list[float]:
    """Return the median microseconds of each run. Every round times all of them."""
    calls = [math.ceil(SHORTEST / min(_seconds(run, run, device) for _ in range(3))) for run in runs]
    turns = [_in_a_row(run, count, device) for run, count in zip(runs, calls, strict=True)]
    rounds = [
        [_seconds(run, turn, device) / count for run, turn, count in zip(runs, turns, calls, strict=True)]
        for _ in range(ROUNDS)
    ]
    return [1e6 * statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def _in_a_row(run: Run, calls: int, device: torch.device) -> Run:
    """Return a function that makes `calls` calls. On a card they are one graph, so Python adds no time."""

    def turn() -> None:
        for _ in range(calls):
            run()

    if device.type != "cuda":
        return turn
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        turn()
    return graph.replay


def _seconds(run: Run, turn: Run, device: torch.device) -> float:
    """Return the seconds of `turn`. A call of `run` first refills the caches, which other runs have used."""
    on_card = device.type == "cuda"
    run()
    now = time.perf_counter if on_card else clock(torch.get_num_threads())
    if on_card:
        torch.cuda.synchronize(device)
    begin = now()
    turn()
    if on_card:
        torch.cuda.synchronize(device)
    return now() - begin
