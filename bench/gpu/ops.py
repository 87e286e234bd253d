"""`python -m bench.gpu.ops`: the problems of some models, timed inside CUDA graphs, as a CSV.

Each contender is captured in one CUDA graph, which calls it on copy after copy of its weights. There are so
many copies that each leaves the card's cache between two uses. Replays are timed, and a call takes a replay's
time over its number of calls. The CSV is written after every problem.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu.problems import DEVICE, Problem, Request, problems
from bench.kernels.timing import captured, summary
from bench.kernels.weights import DTYPES, Call
from bench.report.results import Row, conditions, write_csv

CALLS = 32  # of a graph, at least, so that its own start does not count


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
    case = problem.case
    times = {name: summary(values) for name, values in replay_seconds(problem.contenders).items()}
    facts: Row = {"op": case.op, "model": problem.model, "density": problem.density, "M": case.M}
    facts |= {"dtype": case.dtype, "MB": round(problem.bytes / 1e6, 3)}
    facts |= {"MFLOP": round(2 * case.M * case.multiply_adds / 1e6, 3)}
    for name, us in times.items():
        facts[f"{name} us"] = round(us.median, 2)
        if name.startswith("rana "):
            gigabytes = problem.bytes / us.median / 1e3
            facts[f"{name} p20"], facts[f"{name} p80"] = round(us.p20, 2), round(us.p80, 2)
            facts[f"{name} % of copy"] = round(100 * gigabytes / limits["copy GB/s"], 1)
            facts[f"{name} x dense"] = round(times["dense"].median / us.median, 2)
    return facts | {name: round(value) for name, value in limits.items()}


def replay_seconds(contenders: dict[str, list[Call]], rounds: int = 15) -> dict[str, list[float]]:
    """Return the seconds a call of each contender, one a round. Contenders take turns."""
    graphs = {name: graph(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(1 + rounds):
        for name, (replay, calls) in graphs.items():
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(1e-3 * begin.elapsed_time(end) / calls)
    return {name: values[1:] for name, values in times.items()}


def graph(calls: list[Call]) -> tuple[Callable[[], None], int]:
    """Capture a graph that repeats the calls. Return its replay, and its number of calls."""
    for call in calls:  # compiles, and warms the libraries up
        call()
    torch.cuda.synchronize()
    repeated = calls * math.ceil(CALLS / len(calls))
    return captured(lambda: [call() for call in repeated]), len(repeated)


def bandwidths() -> tuple[float, float]:
    """Return the best GB/s of torch on 1 GiB: of a copy (bytes read and written), and of a read."""
    source = torch.ones(2**28, device=DEVICE)
    target = torch.empty_like(source)
    times = replay_seconds({"copy": [lambda: target.copy_(source)], "read": [lambda: source.sum()]})
    return 2e-9 * source.nbytes / min(times["copy"]), 1e-9 * source.nbytes / min(times["read"])


def peak(dtype: str) -> float:
    """Return the GFLOP/s of a product of two large square matrices."""
    a = torch.randn(8192, 8192, device=DEVICE).to(DTYPES[dtype])
    return 2e-9 * len(a) ** 3 / min(replay_seconds({"product": [lambda: a @ a]})["product"])


if __name__ == "__main__":
    typer.run(main)
