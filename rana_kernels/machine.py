"""What a measurement has to know of the machine it is taken on: its processor, and by which clock to time."""

import platform
import time
from collections.abc import Callable
from pathlib import Path


def processor_name() -> str:
    """The first processor's name, in its own words."""
    return cpu_field("model name") or platform.machine()


def cpu_field(name: str) -> str:
    """Of the first processor, as the kernel tells it; "" where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for key, value in fields if key.strip() == name), "")


def clock(threads: int) -> Callable[[], float]:
    """Seconds. One thread is timed by what the processor spends on it, so that other programs' turns do
    not count; several wait for one another, and are timed by the clock on the wall."""
    return time.thread_time if threads == 1 else time.perf_counter
