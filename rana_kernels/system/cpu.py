"""Facts about the processor: its name, instruction sets and caches, and the clock for measurements."""

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

# The instruction sets that the CPU library is compiled for, from the least to the best. Each one needs its
# processor flags and the flags of all sets before it. `setup.py` has the compiler's flags for each.
INSTRUCTION_SETS: dict[str, set[str]] = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_vnni", "avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}
LARGE_CACHE = 100 * 2**20  # bytes: assumed unless the system reports a larger cache
CACHE_SIZES = "devices/system/cpu/cpu0/cache/index*/size"  # of one processor, under /sys


def features() -> dict[str, bool]:
    """Return for every processor flag in `INSTRUCTION_SETS` whether this processor has it."""
    flags = _flags()
    return {flag: flag in flags for needed in INSTRUCTION_SETS.values() for flag in sorted(needed)}


def is_x86() -> bool:
    """Say whether this is a processor whose flags `INSTRUCTION_SETS` lists."""
    return platform.machine() in ("x86_64", "AMD64")


def runnable_instruction_sets() -> list[str]:
    """Return the names of `INSTRUCTION_SETS` that this process can run, from the least to the best."""
    flags, found = _flags(), []
    for name, needed in INSTRUCTION_SETS.items():
        if not needed <= flags or not _torch_agrees(name) or (name == "amx" and not _may_use_tiles()):
            break
        found.append(name)
    return found


def _flags() -> set[str]:
    """Return the x86 flags of the processor. Other processors (Arm lists "Features") have none of them."""
    return set(cpu_field("flags").split())


def _torch_agrees(name: str) -> bool:
    """Return whether torch uses vectors of that width too. ATEN_CPU_CAPABILITY thus limits our ops too."""
    widths = {"baseline": 0, "avx2": 1}
    capability = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    return widths.get(name, 2) <= capability


def _may_use_tiles() -> bool:
    """Ask Linux for matrix tiles (AMX), and return whether it allows them. A sandbox may refuse.

    `csrc/cpu/amx.h` asks in the same way.
    """
    arch_prctl, request, tile_data = map(ctypes.c_long, (158, 0x1023, 18))
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def processor_name() -> str:
    """Return the name that the first processor reports, or the architecture if it reports none."""
    return cpu_field("model name") or platform.machine()


def cpu_field(name: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, or "" if there is no such field or file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for key, value in fields if key.strip() == name), "")


def cold_bytes(system: Path = Path("/sys")) -> int:
    """Return how many bytes of weights a benchmark must cycle through so that none stay in the cache."""
    kilobytes = [int(path.read_text().rstrip("K\n")) for path in system.glob(CACHE_SIZES)]
    return 3 * max([LARGE_CACHE, *(1024 * size for size in kilobytes)]) // 2


def clock(threads: int) -> Callable[[], float]:
    """Return a clock in seconds for work on `threads` threads.

    For one thread the clock counts the processor time that the thread uses, so that other programs do not
    matter. Several threads wait for one another, so for them it is the wall clock.
    """
    return time.thread_time if threads == 1 else time.perf_counter
