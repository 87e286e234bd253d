"""Tests that run in two processes at once. Each test here takes the outcome that it had in both.

A file whose tests are marked `two_processes` has a function `prepare(folder)` that makes what both processes
read, and returns the environment that names it. The processes talk over gloo.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
STORE = "RANA_TEST_STORE"  # set in both processes alone
Outcomes = dict[str, list[ElementTree.Element]]


def inside() -> bool:
    """Say whether this is one of the two processes."""
    return STORE in os.environ


def run_both(module: ModuleType, folder: Path) -> Outcomes:
    """Run the tests of `module` in both processes. Return the outcomes of each test, by its name."""
    path = ":".join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")])
    environment = {
        **os.environ, **module.prepare(folder), STORE: str(folder / "store"), "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # importing them takes 1.5 s
    }  # fmt: skip
    logs, reports = ([folder / f"{rank}.{kind}" for rank in range(2)] for kind in ("log", "xml"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
             str(module.__file__)],
            cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, (log, report) in enumerate(zip(logs, reports, strict=True))
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # 1: some tests failed, and each of them says so itself
    assert set(codes) <= {0, 1}, "\n".join(log.read_text()[-4000:] for log in logs)
    found: Outcomes = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            found.setdefault(case.attrib["name"], []).append(case)
    return found


def tell(name: str, outcomes: Outcomes) -> None:
    """Pass, fail or skip as the test of that name did in both processes."""
    cases = outcomes.get(name, [])
    assert len(cases) == 2, f"{name} ran in {len(cases)} processes, wanted 2"
    for case in cases:
        for kind in ("failure", "error"):
            for said in case.iter(kind):
                pytest.fail(said.text or said.attrib.get("message", kind), pytrace=False)
        for said in case.iter("skipped"):
            pytest.skip(said.attrib.get("message", "skipped there"))
