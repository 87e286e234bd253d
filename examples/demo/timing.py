"""Fair timing of steps that memory limits.

Weights are rotated over copies that together are larger than the last cache, and contenders take
turns, so that what else the machine does falls on all of them alike.
"""

import copy
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.demo.results import Timing

Step = Callable[[], object]


def thread_counts() -> list[int]:
    return sorted({1, torch.get_num_threads()})


def rotation(module: nn.Module, nbytes: float) -> list[nn.Module]:
    """The module and copies of it, so many that `nbytes` read from each are four times the last cache."""
    count = max(2, math.ceil(4 * _last_cache() / nbytes))
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def measure(
    contenders: dict[object, list[Step]], nbytes: dict[object, float], threads: int, rounds: int
) -> dict[object, Timing]:
    """Time one step of each contender a round, each from its next copy. Contenders may share copies: no
    two in a row read the same one.

    `nbytes`: what a step of each must read.
    """
    seconds: dict[object, list[float]] = {name: [] for name in contenders}
    with _threads(threads), torch.inference_mode():
        for steps in contenders.values():
            steps[0]()
        for turn in range(rounds):
            for place, (name, steps) in enumerate(contenders.items()):
                step = steps[(turn + place) % len(steps)]
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
    return {name: _timing(found, nbytes[name]) for name, found in seconds.items()}


def _timing(seconds: list[float], nbytes: float) -> Timing:
    p20, median, p80 = (float(p) for p in np.percentile(seconds, (20, 50, 80)))
    return Timing(median * 1e6, p20 * 1e6, p80 * 1e6, nbytes / median / 1e9)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _last_cache() -> int:
    """Bytes of the largest cache that Linux knows of; 32 MiB where it does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = (re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()) for path in sizes)
    bytes_of = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(m[1]) * bytes_of[m[2]] for m in found if m), default=32 << 20)
