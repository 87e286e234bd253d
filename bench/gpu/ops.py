"""`python -m bench.gpu.ops`: the problems of some models, timed inside CUDA graphs, as a CSV.

Each contender is captured in one CUDA graph, which calls it on copy after copy of its weights. There are so
many copies that each leaves the card's cache between two uses. Replays are timed, and a call takes a replay's
time over its number of calls. The CSV is written after every problem.
"""

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu.problems import Problem, Request, problems
from bench.gpu.timing import bandwidths, microseconds, peak
from bench.report.results import Row, conditions, write_csv


def main(
    output: Annotated[Path, typer.Argument(help="CSV.")],
    model: Annotated[list[str], typer.Option(help="May be given several times.")],
    tokens: Annotated[list[int], typer.Option(help="Tokens in a call; may be given several times.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    red: Annotated[list[str] | None, typer.Option(help="backend:op that is not to be timed.")] = None,
    peer_dir: Annotated[Path | None, typer.Option(help="Folder with checkouts RaNA/ and TEAL/.")] = None,
) -> None:
    """Time the ops, few tokens first. It does not test them: `python -m bench.gpu` does that before."""
    grid = [Request(name, M, dtype, frozenset(red or ()), peer_dir) for M in tokens for name in model]
    measure(grid, output)


@torch.inference_mode()
def measure(grid: list[Request], output: Path) -> None:
    torch.manual_seed(0)
    copy, read = bandwidths()
    limits = {"copy GB/s": copy, "read GB/s": read, "peak GFLOP/s": peak(grid[0].dtype)}
    print("this card: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    rows: list[Row] = []
    for request in grid:
        for problem in problems(request):
            rows.append(row(problem, limits))
            write_csv(output, conditions("cuda"), rows)
            print(line(rows[-1]))


def line(row: Row) -> str:
    """Return a line to print while the benchmark runs."""
    words = [f"{row['op']} {row['model']} M {row['M']} density {row['density']}: dense {row['dense us']} us"]
    for name in (name.removesuffix(" x dense") for name in row if name.endswith(" x dense")):
        us, faster, share = (row[f"{name} {what}"] for what in ("us", "x dense", "% of copy"))
        words.append(f"{name} {us} us, {faster} x dense, {share} % of copy")
    return "; ".join(words)


def row(problem: Problem, limits: dict[str, float]) -> Row:
    times = microseconds(problem.contenders)
    medians = {name: statistics.median(values) for name, values in times.items()}
    facts: Row = {"op": problem.op, "model": problem.model, "density": problem.density, "M": problem.M}
    facts |= {"dtype": problem.dtype, "MB": round(problem.bytes / 1e6, 3)}
    facts |= {"MFLOP": round(problem.flops / 1e6, 3)}
    for name, values in times.items():
        facts[f"{name} us"] = round(medians[name], 2)
        if name.startswith("rana "):
            gigabytes = problem.bytes / medians[name] / 1e3
            facts[f"{name} p20"] = round(values[len(values) // 5], 2)
            facts[f"{name} p80"] = round(values[4 * len(values) // 5], 2)
            facts[f"{name} % of copy"] = round(100 * gigabytes / limits["copy GB/s"], 1)
            facts[f"{name} x dense"] = round(medians["dense"] / medians[name], 2)
    return facts | {name: round(value) for name, value in limits.items()}


if __name__ == "__main__":
    typer.run(main)
