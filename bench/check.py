"""Has a kernel become slower than the stored results of this machine say? Noise must not look like it.

A case is worse if it lost against the dense layer and against the streaming loop, both measured in the
same rounds as itself, each by more than MARGIN: a busy machine or another torch moves one of them. What looks
worse is timed again, and only what stays worse every time fails.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from bench.kernels import Case
from bench.measure import measure
from bench.report import Row, machine, read_csv

MARGIN = 0.15  # of a ratio
REPETITIONS = 3
RATIOS = ("x dense", "% of stream")
Measure = Callable[[list[Case]], Iterable[Row]]


def against(path: Path, cases: list[Case], threads: list[int], rounds: int, console: Console) -> int:
    """Exit code: 0 if nothing is slower than in `path`, or nothing can be compared; 1 otherwise."""
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
    """(What was worse in every repetition, in words; how many measurements have nothing to compare with)."""
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
