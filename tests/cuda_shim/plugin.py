"""A pytest plugin: in this process, the CUDA kernels serve the CPU, under several schedules of the shim."""

import inspect
import os
from collections import Counter
from pathlib import Path

import pytest

import rana_kernels  # noqa: F401 - loads the CPU library that is replaced here
from tests.cuda_shim import build

build.load(Path(os.environ["RANA_SHIM_LIBRARY"]))
# a schedule, the processors of its card, and what is in the names of the tests that run under it
SCHEDULES = (
    ("forward", "1", ""), ("reverse", "3", "exact"), ("random:1", "4", "close"), ("mixed:2", "2", "exact"),
)  # fmt: skip
ran: Counter[str] = Counter()  # tests, by schedule


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Run a test under each of its schedules. The last one printed is that of a failure."""
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    for schedule, processors, part in SCHEDULES:
        if part in pyfuncitem.name:
            print(f"under {schedule} on {processors} processors")
            os.environ.update(RANA_SHIM_SCHEDULE=schedule, RANA_SHIM_PROCESSORS=processors)
            pyfuncitem.obj(**given)
            ran[schedule] += 1
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for schedule, count in ran.items():
        terminalreporter.write_line(f"under {schedule}: {count} ran")
