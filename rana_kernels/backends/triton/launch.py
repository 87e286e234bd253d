"""The launch of a decode kernel: its scratch memory, the state of its barrier, and its resident grid."""

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
from rana_kernels.backends.triton.weights import MOST_TOKENS

# A program lists the kept rows among so many, then streams them.
CHUNK = 1024
# A barrier's state has 8 int32: arrived, generation, and padding to 32 bytes. For a pointer that is not
# aligned to 16 bytes, Triton would compile the kernel again, which must not happen during a capture.
_STATE = 8
_STATES = 1 << 16
# Each device has a supply of zeroed barrier states, and each (device, stream) has taken one of them.
_supplies: dict[int, "_Supply"] = {}
_of_stream: dict[tuple[int, int], Tensor] = {}
_one_at_a_time = Lock()  # two threads must never get the same state


class _Supply:
    """A supply of zeroed states that gives out each state once.

    The states are never freed, because a CUDA graph holds only their addresses.
    """

    def __init__(self) -> None:
        self.sheets: list[Tensor] = []
        self.left = 0  # states of the last sheet that nobody took yet

    def refill(self, device: torch.device) -> None:
        """Prepare states for the next capture. Call this outside of a capture."""
        if self.left < _STATES / 2:
            self.sheets.append(_filled(device))
            self.left = len(self.sheets[-1])

    def take(self, device: torch.device) -> Tensor:
        """Return a zeroed state that nobody else has."""
        if self.left == 0:
            return torch.zeros(_STATE, dtype=torch.int32, device=device)
        self.left -= 1
        return self.sheets[-1][self.left]


def barrier_state(device: torch.device) -> Tensor:
    """Return an int32 [8] state, without filling memory, that no other launch in flight uses.

    A barrier changes only the generation of its state, so launches on one stream, which follow one another,
    share a state. A captured launch may be replayed at the same time as any other, so it gets its own state
    from a supply that was filled before the capture. (A kernel is always called once before a capture,
    because that call compiles it.)
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
    """Return zeroed states that outlive every CUDA graph.

    Another thread allocates them: while torch.compile warms up for a CUDA graph, memory that the current
    thread allocates belongs to the graph.
    """

    def fill() -> Tensor:
        states = torch.zeros(_STATES, _STATE, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # any stream may take one, so the zeros must be there
        return states

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(fill).result()


def scratch(device: torch.device, *sizes: int) -> list[Tensor]:
    """Allocate uninitialised float32 vectors of these sizes at once. Each is aligned to 128 bytes."""
    ends = list(accumulate(triton.cdiv(size, 32) * 32 for size in sizes))
    memory = torch.empty(ends[-1], dtype=torch.float32, device=device)
    return [memory[end - triton.cdiv(size, 32) * 32 :][:size] for size, end in zip(sizes, ends, strict=True)]


def tokens_of(op: str, name: str, x: Tensor) -> Tensor:
    """Return x [..., K] as a contiguous [M, K]. Raise RuntimeError for float64: only the reference has it."""
    if x.dtype == torch.float64:
        raise RuntimeError(f"rana::{op}: {name} has dtype {x.dtype}, wanted float32, bfloat16 or float16")
    return x.reshape(prod(x.shape[:-1]), x.shape[-1]).contiguous()


def packed(vector: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return an optional vector as a contiguous one, in another dtype if that is given."""
    return None if vector is None else vector.to(dtype or vector.dtype).contiguous()


def working_dtype(x: Tensor, *deciding: Tensor | None) -> torch.dtype:
    """Return the dtype in which an op with the input x [M, K] computes.

    `deciding` are the scales of the weights on which a mask depends. If one is given and these weights become
    floats first, the dtype is float32, because q · scale is exact in no smaller dtype.
    """
    exact = len(x) <= MOST_TOKENS or all(scale is None for scale in deciding)
    return x.dtype if exact else torch.float32


def list_size(M: int, programs: int) -> int:
    """Return the scratch elements for the lists of kept rows. Only single tokens have such lists."""
    return programs * CHUNK if M == 1 else 0


def seated(config: Decode, items: int, device: torch.device) -> int:
    """Return how many programs to launch when no phase has more than `items` pieces of work."""
    return max(1, min(config.seats(device), items))


def run(kernel, phases: int, programs: int, config: Decode, device: torch.device, *args, **constants) -> None:
    """Launch `kernel` once, with all its programs resident at the same time.

    The interpreter runs one program after another. With several programs, it therefore gets one launch for
    each phase.
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
    """Make `device` current: Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
