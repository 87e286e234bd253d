"""Time this revision's kernels against another revision's: two processes take turns, round by round.

The other revision is checked out and built in a temporary directory. Both processes run this revision's
benchmarks, on weights made from the same seed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import rana_kernels
from bench.kernels.case import Case
from bench.kernels.layers import Linear, Lowrank, Mlp, NeuronMlp, Neurons
from bench.kernels.timing import once, repeats, summary
from bench.report.results import ROOT, Row

Ask = Callable[[object], Any]
KINDS: dict[str, type[Case]] = {kind.__name__: kind for kind in (Linear, Lowrank, Neurons, Mlp, NeuronMlp)}


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
def worker(package: Path) -> Iterator[Ask]:
    """Start a process that imports `rana_kernels` from the folder `package`, and these benchmarks.

    Yield a function that sends it a request and returns what it answers: see `answer`.
    """
    with tempfile.TemporaryDirectory(prefix="rana-worker-") as folder:
        # Python looks for modules here first
        for name, place in (("bench", ROOT / "bench"), ("rana_kernels", package)):
            (Path(folder) / name).symlink_to(place)
        command = [sys.executable, "-m", __name__]
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def ask(request: object) -> Any:
            assert process.stdin and process.stdout, "both are pipes"
            print(json.dumps(request), file=process.stdin, flush=True)
            answered = process.stdout.readline()
            if not answered:
                reason = "it printed the reason above"
                raise RuntimeError(f"the process that times {package} ended: {reason}")
            return json.loads(answered)

        try:
            imported = ask(None)
            if Path(imported).resolve() != package.resolve():
                raise ValueError(f"the worker runs {imported}, wanted {package}")
            yield ask
        finally:
            process.communicate()  # closes its input, which ends it


@torch.inference_mode()
def answer() -> None:
    """Answer requests on the standard input, one line of JSON each.

    null                                  the folder that rana_kernels was imported from
    [kind, fields of the case, threads]   true, once the weights are made
    "time"                                the seconds of one call
    """
    time: Callable[[], float] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            found: object = rana_kernels.__path__[0]
        elif request == "time":
            assert time is not None, "a case comes first"
            found = time()
        else:
            kind, fields, threads = request
            time, found = prepared(KINDS[kind](**fields), threads), True
        print(json.dumps(found), flush=True)


def prepared(case: Case, threads: int) -> Callable[[], float]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    run = case.contenders().calls["rana"]
    calls = repeats(run)
    return lambda: once(run, threads, calls)


def rounds_of(
    ours: Ask, theirs: Ask, case: Case, threads: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of a call in each round, of both."""
    for ask in (ours, theirs):
        ask([type(case).__name__, asdict(case), threads])
    pairs = [(ours("time"), theirs("time")) for _ in range(1 + rounds)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


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


if __name__ == "__main__":
    answer()
