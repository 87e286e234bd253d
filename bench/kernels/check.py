"""Compare the kernels with the stored results of this machine, and tell slower kernels from noise.

A case is slower if it lost against the dense layer and against the streaming loop, each by more than MARGIN.
Both are timed in the same rounds as the case: a busy machine or another torch moves only one of them. A
slower case is timed again, and fails only if it stays slower every time.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from bench.kernels.case import Case
from bench.kernels.timing import measure
from bench.report.results import Row, machine, read_csv

MARGIN = 0.15  # of a ratio
REPETITIONS = 3
RATIOS = ("x dense", "% of stream")
Measure = Callable[[list[Case]], Iterable[Row]]


def against(path: Path, cases: list[Case], threads: list[int], rounds: int, console: Console) -> int:
    """Return the exit code: 1 if a case is slower than in `path`, 0 if none is or nothing can be compared."""
    if not path.exists():
        console.print(f"nothing to compare with: {path} is missing. `python -m bench` writes it")
        return 0
    stamp, stored = read_csv(path)
    if not stamp.startswith(machine()):
        console.print(f"not compared: {path.name} is of {stamp!r}, this is {machine()!r}")
        return 0
    console.print(f"against {stamp}; a case fails if {' and '.join(RATIOS)} fall by {MARGIN:.0%} every time")
    worse, unknown = slower(stored, cases, lambda some: measure(some, ["auto"], threads, rounds))
    if unknown:
        console.print(f"{unknown} of the measurements are not in {path.name}, and were not compared")
    for line in worse:
        console.print(f"[red]slower:[/red] {line}")
    console.print("slower than stored" if worse else "nothing is slower than stored")
    return 1 if worse else 0


def slower(stored: Iterable[Row], cases: list[Case], time: Measure) -> tuple[list[str], int]:
    """Return a line for each case that was slower every time, and how many measurements are not stored."""
    before = {(row["case"], str(row["threads"])): row for row in stored}
    suspects: dict[tuple[object, str], str] = {}
    unknown = 0
    for repetition in range(REPETITIONS):
        found = {(row["case"], str(row["threads"])): row for row in time(cases)}
        if repetition == 0:
            unknown = len(found.keys() - before.keys())
            suspects = dict.fromkeys(found.keys() & before.keys(), "")
        suspects = {
            key: words(found[key], before[key]) for key in suspects if is_worse(found[key], before[key])
        }
        cases = [case for case in cases if any(case.name == name for name, _ in suspects)]
        if not cases:
            break
    return list(suspects.values()), unknown


def is_worse(now: Row, before: Row) -> bool:
    return all(float(str(now[name])) < (1 - MARGIN) * float(str(before[name])) for name in RATIOS)


def words(now: Row, before: Row) -> str:
    changes = ", ".join(f"{name} {before[name]} → {now[name]}" for name in RATIOS)
    return f"{now['case']}, threads {now['threads']}: {changes}"
