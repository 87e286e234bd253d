"""Time this revision's kernels against another revision's: two processes take turns, round by round.

The other revision is checked out and built in a temporary directory. Both processes run this revision's
benchmarks, on weights made from the same seed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.kernels.cases import Case
from bench.kernels.timing import summary
from bench.report.results import ROOT, Row


def against(revision: str, cases: list[Case], threads: list[int], rounds: int, console: Console) -> list[Row]:
    """Return one row a case and number of threads.

    Raise ValueError if there is no such revision, or it does not build.
    """
    with ExitStack() as stack:
        console.print(f"building {revision} in a worktree of its own")
        package = stack.enter_context(checkout(revision))
        ours = stack.enter_context(worker(ROOT / "rana_kernels"))
        theirs = stack.enter_context(worker(package))
        return [
            row(case, count, *rounds_of(ours, theirs, case, count, rounds))
            for case in track(cases, "timing", console=console)
            for count in threads
        ]


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Yield the folder `rana_kernels` of that revision, with its CPU kernels compiled."""
    with tempfile.TemporaryDirectory(prefix="rana-base-") as folder:
        tree = Path(folder) / "tree"
        _run(["git", "worktree", "add", "--detach", str(tree), revision], ROOT, {})
        try:
            _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, {"RANA_BUILD": "cpu"})
            yield tree / "rana_kernels"
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)], ROOT, {})


def _run(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    found = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if found.returncode != 0:
        raise ValueError(f"{' '.join(command)} failed: {(found.stdout + found.stderr).strip()[-2000:]}")


@contextmanager
def worker(package: Path) -> Iterator["Worker"]:
    """Start a process that imports `rana_kernels` from the folder `package`, and these benchmarks."""
    with tempfile.TemporaryDirectory(prefix="rana-worker-") as folder:
        # Python looks for modules here first
        for name, place in (("bench", ROOT / "bench"), ("rana_kernels", package)):
            (Path(folder) / name).symlink_to(place)
        command = [sys.executable, "-m", "bench.kernels.worker"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True)
        try:
            started = Worker(process, package)
            imported = started.ask({"package": None})
            if Path(str(imported)).resolve() != package.resolve():
                raise ValueError(f"the worker runs {imported}, wanted {package}")
            yield started
        finally:
            process.communicate()  # closes its input, which ends it


class Worker:
    """A process that answers one line of JSON with another."""

    def __init__(self, process: subprocess.Popen, package: Path) -> None:
        self.process, self.package = process, package

    def ask(self, request: dict[str, object]) -> object:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout, "both are pipes"
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that times {self.package} ended: it printed the reason above")
        return json.loads(answer)


def rounds_of(
    ours: Worker, theirs: Worker, case: Case, threads: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of a call in each round, of both."""
    for each in (ours, theirs):
        each.ask({"case": {type(case).__name__: asdict(case)}, "threads": threads})
    pairs = [(ours.ask({"time": None}), theirs.ask({"time": None})) for _ in range(1 + rounds)][1:]
    return [float(str(a)) for a, _ in pairs], [float(str(b)) for _, b in pairs]


def row(case: Case, threads: int, ours: list[float], theirs: list[float]) -> Row:
    """Return a row. `x base` is the median of the rounds' ratios, with 20th and 80th percentile."""
    # `summary` multiplies by a million, because it is made for seconds
    ratio = summary([1e-6 * b / a for a, b in zip(ours, theirs, strict=True)])
    return {
        "case": case.name,
        "threads": threads,
        "us": round(summary(ours).median, 1),
        "base us": round(summary(theirs).median, 1),
        "x base": round(ratio.median, 3),
        "p20": round(ratio.p20, 3),
        "p80": round(ratio.p80, 3),
    }
