"""Random weights, in copies that leave the cache between two uses, and thresholds for them.

All weights, dense ones too, lie on huge pages where the system gives them, as a served model's do.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rana_kernels.system.cpu import cold_bytes
from rana_kernels.system.huge_pages import collapse

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
Call = Callable[[], Tensor]
PART = 2**22  # values of a weight that are drawn together, from a pool of twice as many


@cache
def _pool() -> Tensor:
    return torch.randn(2 * PART)


def weight(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return random [rows, columns] where `like` is, scaled so that products have the size of their input."""
    flat = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    if like.is_cuda:
        return flat.normal_(std=columns**-0.5).view(rows, columns)
    for part in flat.split(PART):
        start = int(torch.randint(2 * PART - len(part), ()))
        part.copy_(_pool()[start : start + len(part)] * columns**-0.5)
    collapse([flat])
    return flat.view(rows, columns)


def transposed(weight: Tensor) -> Tensor:
    made = weight.T.contiguous()
    collapse([made])
    return made


def copies(make: Callable[[], tuple], read: float | None = None, cold: float | None = None) -> list[tuple]:
    """Call `make` so often that the cache forgets one result before its next turn.

    read   bytes of a copy that a call reads; None: all of it
    cold   bytes that the cache does not hold; None: those of the processor
    """
    first = make()
    size = sum(t.nbytes for t in first) if read is None else int(read)
    return [first, *(make() for _ in range(math.ceil((cold or cold_bytes()) / max(size, 1))))]


def turns(call: Callable[..., Tensor], arguments: list[tuple]) -> Callable[[], Tensor]:
    """Return a call without arguments that takes the next copy each time."""
    cycle = itertools.cycle(arguments)
    return lambda: call(*next(cycle))


def far(arguments: list[tuple]) -> list[tuple]:
    """Return the same copies for a second contender, rotated away from those that the first just read."""
    half = len(arguments) // 2
    return arguments[half:] + arguments[:half]


def threshold_for_live(live: int, scores: Tensor) -> Tensor:
    """Return the threshold, [] float32, that `live` of the scores [M, R] reach, averaged over tokens."""
    ordered = scores.flatten().sort(descending=True).values
    count = live * scores.shape[0]
    if count >= len(ordered):
        return ordered.new_zeros(())
    return (ordered[count - 1] + ordered[count]) / 2 if count else ordered[0] + 1


def masked(h: Tensor, threshold: Tensor) -> Tensor:
    """Zero the values of h whose size is below the threshold, in torch's own operations."""
    return torch.where(h.abs() < threshold, 0, h)


def rows_read(scores: Tensor, threshold: Tensor) -> int:
    """Return how many rows at least one token keeps, by its scores [M, R]."""
    return int((scores >= threshold).any(0).sum())
