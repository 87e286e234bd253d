"""What every decode kernel needs to run: scratch memory, the state of its barrier, a resident grid."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate
from math import prod
from threading import Lock

import torch
import triton
from torch import Tensor

from rana_kernels.backends.triton import interpreted
from rana_kernels.backends.triton.configurations import Decode

# Rows that a program lists at a time before it streams those it keeps.
CHUNK = 1024
# int32 of a barrier: arrived, generation, and room to 32 bytes. Triton compiles again for a pointer that does
# not lie on 16, and must not while a launch is captured.
_STATE = 8
_STATES = 1 << 16
# Barrier states: a supply of zeroed ones for each device, and those that each (device, stream) took of it.
_supplies: dict[int, "_Supply"] = {}
_of_stream: dict[tuple[int, int], Tensor] = {}
_one_at_a_time = Lock()  # no two threads may be given the same state


class _Supply:
    """Zeroed states, each given out once. They are never freed: a graph knows no more than where they lie."""

    def __init__(self) -> None:
        self.sheets: list[Tensor] = []
        self.left = 0  # of the last sheet

    def refill(self, device: torch.device) -> None:
        """To be called outside of a capture, for the next one."""
        if self.left < _STATES / 2:
            self.sheets.append(_filled(device))
            self.left = len(self.sheets[-1])

    def take(self, device: torch.device) -> Tensor:
        if self.left == 0:
            return torch.zeros(_STATE, dtype=torch.int32, device=device)
        self.left -= 1
        return self.sheets[-1][self.left]


def barrier_state(device: torch.device) -> Tensor:
    """A zeroed int32 [8] that no launch in flight uses, without filling memory on the way.

    A barrier leaves its state as it found it, but for the generation, so launches that follow one
    another on a stream share one. A captured launch may be replayed next to anything: it gets a state
    of its own, from a supply that was filled before any capture (a kernel has to be compiled by a
    first call before it can be captured, anyhow).
    """
    if device.type == "cpu":
        return torch.zeros(_STATE, dtype=torch.int32)
    with _one_at_a_time:
        supply = _supplies.setdefault(device.index, _Supply())
        if torch.cuda.is_current_stream_capturing():
            return supply.take(device)
        supply.refill(device)
        key = (device.index, torch.cuda.current_stream(device).cuda_stream)
        if key not in _of_stream:
            _of_stream[key] = supply.take(device)
        return _of_stream[key]


def _filled(device: torch.device) -> Tensor:
    """Zeroed states that outlive every graph.

    By a thread of their own: while torch.compile warms up for a CUDA graph, what this thread allocates
    counts as the graph's.
    """

    def fill() -> Tensor:
        states = torch.zeros(_STATES, _STATE, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # any stream may take one
        return states

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(fill).result()


def scratch(device: torch.device, *sizes: int) -> list[Tensor]:
    """Uninitialised float32 vectors of these sizes, from one allocation; each starts on 128 bytes."""
    ends = list(accumulate(triton.cdiv(size, 32) * 32 for size in sizes))
    memory = torch.empty(ends[-1], dtype=torch.float32, device=device)
    return [memory[end - triton.cdiv(size, 32) * 32 :][:size] for size, end in zip(sizes, ends, strict=True)]


def tokens_of(op: str, name: str, x: Tensor) -> Tensor:
    """x [..., K] as a contiguous [M, K]; float64, which only the reference computes in, is refused."""
    if x.dtype == torch.float64:
        raise RuntimeError(f"rana::{op}: {name} has dtype {x.dtype}, wanted float32, bfloat16 or float16")
    return x.reshape(prod(x.shape[:-1]), x.shape[-1]).contiguous()


def packed(vector: Tensor | None) -> Tensor | None:
    """An optional vector, its elements side by side."""
    return None if vector is None else vector.contiguous()


def list_size(M: int, programs: int) -> int:
    """Elements of scratch for the lists of kept rows, which only single tokens have."""
    return programs * CHUNK if M == 1 else 0


def seated(config: Decode, items: int, device: torch.device) -> int:
    """How many programs to launch when no phase has more than `items` pieces of work."""
    return max(1, min(config.seats(device), items))


def run(kernel, phases: int, programs: int, config: Decode, device: torch.device, *args, **constants) -> None:
    """Launch `kernel` once, all its programs resident together.

    The interpreter runs one program after another, so there each phase of a larger grid is a launch
    of its own.
    """
    at_once = not interpreted() or programs == 1
    with on(device):
        state = barrier_state(device)
        for phase in (0,) if at_once else range(1, phases + 1):
            kernel[(programs,)](
                *args, state=state, **constants, CHUNK=CHUNK, THREADS=config.warps * 32, PHASE=phase,
                num_warps=config.warps, maxnreg=config.registers, launch_cooperative_grid=True,
            )  # fmt: skip


def on(device: torch.device):
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
