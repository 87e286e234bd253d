"""`python -m bench`: the tests of the ops, then every kernel against its baselines, in a table and a CSV."""

import csv
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.kernels import DECODE, DENSITY, PREFILL, Case
from bench.timing import Round, interleave
from rana_kernels import backends

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
console = Console(width=None if sys.stdout.isatty() else 150)


def main(
    only: Annotated[str, typer.Option(help="Regular expression: the cases to run, by name.")] = "",
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; default 1 and all.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds a case.")] = 15,
    output: Annotated[
        Path | None, typer.Option(help="CSV file; default bench/results/<processor>.csv.")
    ] = None,
) -> None:
    """Time the ops on this machine.

    Contenders take turns on rotated copies of their weights, larger than the last-level cache. `x dense`
    and its neighbours say how many times as fast as that baseline ours is; `% of stream` is the weight
    bytes that ours must read, over its time, against the best streaming loop timed in the same rounds.

    Nothing is timed unless the tests of the ops pass.

    Example:  python -m bench --only 'lowrank.*M=1 bf16' --threads 1
    """
    require_green_tests()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        cases = [case for case in (*DECODE, *DENSITY, *PREFILL) if re.search(only, case.name)]
        for case in track(cases, "timing", console=console):
            contenders = case.contenders()
            for count in threads or sorted({1, torch.get_num_threads()}):
                measured = interleave(contenders.calls, count, rounds)
                rows.append(row(case, count, measured, contenders.bytes))
    show(rows)
    path = output or RESULTS / f"{processor()}.csv"
    write(path, rows)
    console.print(f"wrote {path}")


def require_green_tests() -> None:
    tests = [ROOT / "tests/test_ops.py", ROOT / "tests/test_ops_properties.py"]
    console.print("testing the ops first")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", *tests],
        cwd=ROOT,
        check=False,
    )
    if result.returncode != 0:
        console.print("[red]the tests of the ops fail: no numbers")
        raise typer.Exit(1)


def row(case: Case, threads: int, measured: Round, weight_bytes: float) -> dict[str, object]:
    ours = measured.times["rana"]
    gigabytes = weight_bytes / ours.median / 1e3
    ratios = {f"x {name}": t.median / ours.median for name, t in measured.times.items() if name != "rana"}
    return {
        "case": case.name,
        "keep": round(case.keep, 3),
        "threads": threads,
        "us": round(ours.median, 1),
        "p20": round(ours.p20, 1),
        "p80": round(ours.p80, 1),
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
        "GB/s": round(gigabytes, 1),
        "stream GB/s": round(measured.stream, 1),
        "% of stream": round(100 * gigabytes / measured.stream),
    }


def columns(rows: list[dict[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def show(rows: list[dict[str, object]]) -> None:
    table = Table(title="rana ops against their baselines (medians)")
    for name in columns(rows):
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=name == "case")
    for entry in rows:
        table.add_row(*(str(entry.get(name, "")) for name in columns(rows)))
    console.print(table)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """CSV with the machine, versions and revision on its first line, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.write(f"# {conditions()}\n")
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def conditions() -> str:
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return (
        f"{processor()}, {torch.get_num_threads()} threads, {backends.instruction_set()}, "
        f"served by {set(s['cpu'] for s in backends.serving().values())}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {date.today()}, revision {revision.stdout.strip() or 'unknown'}"
    )


def processor() -> str:
    """What the processor calls itself, as a file name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1] for line in lines if line.startswith("model name")), platform.machine())
    return re.sub(r"\W+", "-", model.strip()).strip("-").lower()


if __name__ == "__main__":
    typer.run(main)
