"""Compile the Triton kernels for cards that are not here, and read off what they use.

The ops are called as a model calls them, on tensors of a model's shapes, under a driver that knows
the target and compiles in place of launching: what is looked at is what would run.

    python -m tests.triton_compile      prints the table
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.cases import DTYPES

# multiprocessors and shared memory of a block (bytes, CUDA programming guide) by compute capability
CARDS = {80: (108, 163 * 1024), 90: (132, 227 * 1024), 100: (148, 227 * 1024)}
TOKENS = (1, 5, 33, 200)
# the widths of the weights; 16 stands for the dtype of the input
BITS = (16, 8, 4)
# (K, R, N, I) of Llama-2-7B and Llama-3.2-1B, R as for keep 0.56
SHAPES = {"7B": (4096, 2464, 4096, 11008), "1B": (2048, 1232, 2048, 8192)}
PINNED = "3.6.0"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one card.

    streams   loads that stream weights; `narrow` of them have fewer than 16 bytes
    scalars   loads of 2 bytes, as scales are
    """

    kernel: str
    capability: int
    dtype: str
    bits: int
    tokens: int
    shape: str
    registers: int
    local: int
    shared: int
    streams: int
    narrow: int
    scalars: int
    threads: int


class _Target:
    """Stands in for triton's driver of a card."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, object]]]:
    """Within the block, launches compile for a card and are noted as (kernel, compiled).

    Products that torch computes beside them return memory as it is: one in float16 would take a CPU 20 s.
    """
    from rana_kernels.backends.triton.configurations import Decode

    noted: list[tuple[str, object]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        noted.append((f"{self.module.split('.')[-1]}.{self.fn.__name__}", compiled))
        return compiled

    with (
        mock.patch.object(driver, "_active", _Target(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch, "mm", lambda a, b: a.new_empty(len(a), b.shape[1])),
        mock.patch.object(torch, "addmm", lambda bias, a, b: a.new_empty(len(a), b.shape[1])),
        mock.patch.object(Decode, "seats", lambda self, device: self.residents * CARDS[capability][0]),
    ):
        yield noted


def calls(shape: str, tokens: int, dtype: torch.dtype, bits: int = 16) -> Iterator[tuple[str, list]]:
    """(op, arguments) at a model's shapes; nothing is read, so the memory is never filled."""
    K, R, N, neurons = SHAPES[shape]

    def t(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def weight(rows: int, columns: int) -> torch.Tensor:
        stored = {16: (columns, dtype), 8: (columns, torch.int8), 4: (columns // 2, torch.uint8)}
        width, kind = stored[bits]
        return torch.empty(rows, width, dtype=kind)

    def scale(rows: int, columns: int) -> torch.Tensor | None:
        """Of groups of 32, whose scales are the most to load."""
        return None if bits == 16 else torch.empty(rows, columns // 32, dtype=torch.float16)

    threshold, norms, one = torch.empty(R), torch.empty(neurons), torch.empty(())
    x, up, down, joint = t(tokens, K), (R, neurons), (neurons, N), (K, neurons)
    yield "masked_linear", [t(tokens, neurons), weight(*down), one, norms, None, scale(*down)]
    lowrank = [weight(R, K), weight(R, N), threshold, t(N), scale(R, K), scale(R, N)]
    yield "masked_lowrank_linear", [x, *lowrank]
    end = [weight(*down), norms, one, None, "silu"]
    ranks = [weight(2 * R, K), weight(*up), weight(*up), torch.empty(2 * R), None, None, None]
    yield "masked_mlp", [x, *ranks, *end, scale(2 * R, K), scale(*up), scale(*up), scale(*down)]
    neuron = [None, weight(*joint), weight(*joint), one, torch.empty(K), None, None]
    yield "masked_mlp", [x, *neuron, *end, None, scale(*joint), scale(*joint), scale(*down)]
    yield "linear", [x, weight(neurons, K), t(neurons), scale(neurons, K)]


def every_kind(capability: int, tokens: int) -> Iterator[tuple[torch.dtype, int]]:
    """Every dtype of the input with every width of the weights, as far as kernels read them."""
    return product(DTYPES, BITS if tokens <= 16 else BITS[:1])


def compile_all(
    capabilities=tuple(CARDS),
    shapes=tuple(SHAPES),
    kinds=every_kind,
    quiet: bool = True,
) -> list[Compiled]:
    """Compile every kernel × kind × tokens × shape for these cards; see `Compiled`."""
    from rana_kernels.backends.triton import linear, masked_linear, masked_lowrank_linear, masked_mlp

    modules = (linear, masked_linear, masked_lowrank_linear, masked_mlp)
    modules = {m.__name__.split(".")[-1]: m for m in modules}
    grid = [(c, s, m, *k) for c in capabilities for s in shapes for m in TOKENS for k in kinds(c, m)]
    rows: dict[Compiled, None] = {}
    for capability, shape, tokens, dtype, bits in track(grid, "compiling", disable=quiet):
        with compiling(capability) as noted:
            for op, arguments in calls(shape, tokens, dtype, bits):
                getattr(modules[op], op)(*arguments)
        for kernel, compiled in noted:
            name = str(dtype).removeprefix("torch.")
            rows[inspect(kernel, compiled, capability, name, bits, tokens, shape)] = None
    return list(rows)


def inspect(
    kernel: str, compiled, capability: int, dtype: str, bits: int, tokens: int, shape: str
) -> Compiled:
    registers, local, shared = resources(compiled.asm["cubin"])
    widths = streaming_loads(compiled.asm["ptx"])
    if not widths and not kernel.startswith("products"):
        # for several tokens weights may go to shared memory, by copies of 16 bytes that carry no mark
        widths = [16] * compiled.asm["ptx"].count("cp.async.cg.")
    return Compiled(
        kernel, capability, dtype, bits, tokens, shape, registers, local,
        max(shared, compiled.metadata.shared), len(widths), sum(w < 16 for w in widths),
        len(re.findall(r"ld\.global\S*\.b16", compiled.asm["ptx"])), compiled.metadata.num_warps * 32,
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, local memory, static shared memory), from the tool that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return found["REG"], found["LOCAL"] + found["STACK"], found["SHARED"]


def streaming_loads(ptx: str) -> list[int]:
    """Bytes of each load that streams weights: they alone are marked to be evicted first."""
    loads = re.findall(r"ld\.global\S*evict_first\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(lanes or 1) * int(bits) // 8 for lanes, bits in loads]


def table(rows: list[Compiled]) -> Table:
    columns = [
        "kernel",
        "sm",
        "dtype",
        "bits",
        "M",
        "shape",
        "threads",
        "registers",
        "local",
        "shared",
        "16-byte streams",
        "2-byte loads",
    ]
    shown = Table(*columns, title=f"Triton {triton.__version__}, compiled without a card")
    for r in rows:
        shown.add_row(
            r.kernel, str(r.capability), r.dtype, str(r.bits), str(r.tokens), r.shape, str(r.threads),
            str(r.registers), str(r.local), str(r.shared), f"{r.streams - r.narrow}/{r.streams}",
            str(r.scalars),
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    Console(width=140).print(table(compile_all(quiet=False)))
