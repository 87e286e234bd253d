"""This revision's kernels against another one's: two processes that take turns, round by round.

The other revision is checked out and built in a temporary directory. Both processes run the benchmark code
of this one, on weights made from the same seed.
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
from types import TracebackType

from rich.console import Console
from rich.progress import track

from bench.kernels import Case
from bench.report import ROOT, Row
from bench.timing import summary


def against(revision: str, cases: list[Case], threads: list[int], rounds: int, console: Console) -> list[Row]:
    """One row a case and number of threads. ValueError if there is no such revision, or it does not build."""
    with ExitStack() as stack:
        console.print(f"building {revision} in a worktree of its own")
        package = stack.enter_context(checkout(revision))
        ours = stack.enter_context(Worker(ROOT / "rana_kernels"))
        theirs = stack.enter_context(Worker(package))
        return [
            row(case, count, *rounds_of(ours, theirs, case, count, rounds))
            for case in track(cases, "timing", console=console)
            for count in threads
        ]


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The folder `rana_kernels` of that revision, its CPU kernels compiled."""
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


class Worker:
    """A process that imports the `rana_kernels` of a folder, and times a call whenever it is told to."""

    def __init__(self, package: Path) -> None:
        self.package = package

    def __enter__(self) -> "Worker":
        self._folder = tempfile.TemporaryDirectory(prefix="rana-worker-")
        # modules are looked for here first: this bench, that package
        for name, place in (("bench", ROOT / "bench"), ("rana_kernels", self.package)):
            (Path(self._folder.name) / name).symlink_to(place)
        command = [sys.executable, "-m", "bench.worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=self._folder.name, stdin=pipe, stdout=pipe, text=True)
        served = self.ask({"package": None})
        if Path(str(served)).resolve() != self.package.resolve():
            raise ValueError(f"the worker runs {served}, wanted {self.package}")
        return self

    def ask(self, request: dict[str, object]) -> object:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout, "both are pipes"
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that times {self.package} ended: it has said why above")
        return json.loads(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input, and so ends it
        self._folder.cleanup()


def rounds_of(
    ours: Worker, theirs: Worker, case: Case, threads: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds a call, round by round."""
    for worker in (ours, theirs):
        worker.ask({"case": {type(case).__name__: asdict(case)}, "threads": threads})
    pairs = [(ours.ask({"time": None}), theirs.ask({"time": None})) for _ in range(1 + rounds)][1:]
    return [float(str(a)) for a, _ in pairs], [float(str(b)) for _, b in pairs]


def row(case: Case, threads: int, ours: list[float], theirs: list[float]) -> Row:
    """`x base` is the median of the rounds' ratios, between its 20th and 80th percentile."""
    # a ratio is summed up as a time is; the unit of a summary is a millionth
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
