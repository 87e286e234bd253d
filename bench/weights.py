"""Random weights for benchmarks, in copies that leave the cache between two uses; where thresholds go.

They lie on huge pages where the system gives them, the dense ones like ours: so a compressed model is served.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from rana_kernels.system.cpu import cold_bytes
from rana_kernels.system.huge_pages import collapse

PART = 2**22  # values of a weight that are drawn together, from a pool of twice as many


@cache
def _pool() -> Tensor:
    return torch.randn(2 * PART)


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] random, scaled so that products stay of the size of their input."""
    flat = torch.empty(rows * columns, dtype=dtype)
    for part in flat.split(PART):
        start = int(torch.randint(2 * PART - len(part), ()))
        part.copy_(_pool()[start : start + len(part)] * columns**-0.5)
    collapse([flat])
    return flat.view(rows, columns)


def copies(make: Callable[[], tuple[Tensor, ...]], read: float | None = None) -> list[tuple]:
    """So many results of `make` that a cache forgets one before its next turn.

    `read`: bytes of a copy that a call reads, if not all of it.
    """
    first = make()
    size = sum(t.nbytes for t in first) if read is None else int(read)
    return [first, *(make() for _ in range(math.ceil(cold_bytes() / max(size, 1))))]


def turns(call: Callable[..., Tensor], arguments: list[tuple]) -> Callable[[], Tensor]:
    """A call of no arguments that takes the next copy each time."""
    cycle: Iterator[tuple] = itertools.cycle(arguments)
    return lambda: call(*next(cycle))


def far(arguments: list[tuple]) -> list[tuple]:
    """The same copies for a second contender, so begun that it does not find what the first has just read."""
    half = len(arguments) // 2
    return arguments[half:] + arguments[:half]


def threshold_keeping(live: int, scores: Tensor) -> Tensor:
    """The threshold, [] float32, that `live` of the scores [M, R] reach in the mean over tokens."""
    ordered = scores.flatten().sort(descending=True).values
    kept = live * scores.shape[0]
    if kept >= len(ordered):
        return ordered.new_zeros(())
    return (ordered[kept - 1] + ordered[kept]) / 2 if kept else ordered[0] + 1


def wanted(scores: Tensor, threshold: Tensor) -> int:
    """How many rows some token wants, of its scores [M, R]."""
    return int((scores >= threshold).any(0).sum())
