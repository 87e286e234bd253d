"""Other Python processes, for tests of how a process starts: its environment, or what it imports first."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run this Python with other arguments at the repository's root. `environment` is added to our own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def pytest_passes(*arguments: str, **environment: str) -> str:
    """Run pytest in a process of its own and return its output. Fail unless tests ran and all of them passed.

    The plugins stay out: no test needs one here, and importing them takes 1.5 s.
    """
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}
    child = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, **environment)
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
    assert " passed" in child.stdout, child.stdout[-500:]
    return child.stdout
