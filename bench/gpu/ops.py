"""`python -m bench.gpu.ops`: the ops at the sizes of known models, timed inside CUDA graphs, as a CSV.

Each contender is captured in one CUDA graph, which calls it on copy after copy of its weights. There are so
many copies that each leaves the card's cache between two uses. Replays are timed, and a call takes a replay's
time over its number of calls. The CSV is written after every problem.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bench.gpu import peers
from bench.kernels.baselines import low_rank, static_rank
from bench.kernels.case import Weights
from bench.kernels.cases import COST_RATIO, MODELS, Case, Lowrank, Neurons, cases
from bench.kernels.timing import captured, summary
from bench.kernels.weights import DTYPES, Call, copies, masked, weight
from bench.report.results import Row, conditions, write_csv
from rana_kernels import backends
from rana_kernels.backends import use_backend

DEVICE = "cuda"
LAYERS = ("up", "down", "mlp")
DENSITIES = (COST_RATIO, 1.0, 0.25, 0.1)
CACHES = 3  # the copies of a weight take this many times the card's cache
BACKENDS = ("cuda", "triton")
CALLS = 32  # of a graph, at least, so that its own start does not count
Contenders = dict[str, list[Call]]


@dataclass(frozen=True)
class Problem:
    """One op at one size. `contenders` by name: each is one call for each copy of its weights.

    bytes    of weights that ours must read, with the masks as they are
    """

    case: Case
    model: str
    density: float
    bytes: float
    contenders: Contenders


@dataclass(frozen=True)
class Request:
    """The layers of a model for M tokens. `red`: "backend:op" that is not to be timed.

    peer_dir   a folder with the kernels that others published, or None
    """

    model: str
    M: int
    dtype: str
    red: frozenset[str] = frozenset()
    peer_dir: Path | None = None


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


def problems(request: Request) -> Iterator[Problem]:
    """Yield the up projection, the down projection and the whole gated MLP, each at every density."""
    for layer in LAYERS:
        for density in DENSITIES:
            case = cases(MODELS[request.model], density, request.M, request.dtype)[layer]
            x = case.inputs(DEVICE)
            weights = copies(partial(case.adapter, x), cold=CACHES * cache_bytes())
            contenders = {
                **baselines(case, x, weights),
                **ours(case, x, weights, request.red),
                **peers.published(request.peer_dir, case, x, weights),
            }
            touched = DTYPES[case.dtype].itemsize * case.values_read(x, weights[0])
            yield Problem(case, request.model, density, touched, contenders)


def baselines(case: Case, x: Tensor, weights: list[Weights]) -> Contenders:
    if isinstance(case, Neurons):  # the rows are also the weight of the dense product
        return {
            "dense": [partial(torch.mm, x, rows) for rows, *_ in weights],
            "masked in torch": [partial(_masked_product, x, rows, t) for rows, t, _ in weights],
        }

    def dense(*shapes: tuple[int, int]) -> list[Weights]:
        return copies(lambda: tuple(weight(*s, like=x) for s in shapes), cold=CACHES * cache_bytes())

    found: Contenders = {"dense": [partial(case.layer, x, *w) for w in dense(*case.shapes)]}
    if isinstance(case, Lowrank):
        rank = static_rank(case.cost_ratio, case.K, case.N)
        factors = dense((case.N, rank), (rank, case.K))
        found["static"] = [partial(low_rank, x, B, A) for A, B in factors]
        found["masked in torch"] = [partial(_masked_ranks, x, *w) for w in weights]
    return found


def _masked_product(h: Tensor, rows: Tensor, threshold: Tensor) -> Tensor:
    return torch.mm(masked(h, threshold), rows)


def _masked_ranks(x: Tensor, B: Tensor, rows: Tensor, threshold: Tensor) -> Tensor:
    return _masked_product(F.linear(x, B), rows, threshold)


def ours(case: Case, x: Tensor, weights: list[Weights], red: frozenset[str]) -> Contenders:
    """Return the op by each installed backend that is not red: {"rana cuda": calls, "rana triton": calls}."""

    def served(backend: str, given: Weights) -> Tensor:
        with use_backend(backend):
            return case.run(x, *given)

    return {
        f"rana {backend}": [partial(served, backend, given) for given in weights]
        for backend in BACKENDS
        if f"{backend}:{case.op}" not in red and backends.installed(backend)
    }


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


if __name__ == "__main__":
    typer.run(main)
