"""What a measurement has to know of its machine: processor, caches, and by which clock to time."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

LARGE_CACHE = 100 * 2**20  # bytes, where the system tells of none larger
CACHE_SIZES = "devices/system/cpu/cpu0/cache/index*/size"  # of one processor, under /sys


def processor_name() -> str:
    """The first processor's name, in its own words."""
    return cpu_field("model name") or platform.machine()


def cpu_field(name: str) -> str:
    """Of the first processor, as the kernel tells it; "" where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for key, value in fields if key.strip() == name), "")


def cold_bytes(system: Path = Path("/sys")) -> int:
    """So many bytes of weights, used in turn, that the last-level cache forgets each before its next turn."""
    kilobytes = [int(path.read_text().rstrip("K\n")) for path in system.glob(CACHE_SIZES)]
    return 3 * max([LARGE_CACHE, *(1024 * size for size in kilobytes)]) // 2


def clock(threads: int) -> Callable[[], float]:
    """Seconds. One thread is timed by what the processor spends on it, so that other programs' turns do
    not count; several wait for one another, and are timed by the clock on the wall."""
    return time.thread_time if threads == 1 else time.perf_counter
