"""`python -m bench.gpu`: the tests that need a card, then the ops against their baselines, on that card.

Each contender is captured in one CUDA graph that calls it on copy after copy of its weights, so many
that they leave the card's cache between two uses. What is timed are replays; a call is a replay's time
over the number of copies. Nothing is timed unless the tests pass.
"""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bench import peers
from bench.baselines import DTYPES
from bench.gpu_timing import DEVICE, Call, bandwidths, microseconds, peak
from bench.models import MODELS, stored_ranks
from bench.report import RESULTS, ROOT, Row, revision, versions, write_csv
from bench.report import show as show_table
from rana_kernels import backends, ops
from rana_kernels.backends import use_backend

DEFAULT = ("Llama-2-7B", "Llama-3-8B", "Llama-3.2-1B")
DENSITIES = (1.0, 0.5, 0.25, 0.1)
TOKENS = (1, 2, 4, 8, 16, 64, 512)
CACHES = 3  # times the card's cache that the copies of a weight take
console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass
class Problem:
    """One op at one size. `contenders` by name: each is one call for each copy of its weights.

    bytes    of weights that ours must read, with the masks as they are
    flops    that ours has to do: two a multiply-add, for the rows that each token keeps
    """

    op: str
    model: str
    density: float
    M: int
    dtype: str
    bytes: float
    flops: float
    contenders: dict[str, list[Call]] = field(default_factory=dict)


def main(
    only: Annotated[str, typer.Option(help="Only this model, of: " + ", ".join(MODELS))] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    peer_dir: Annotated[Path | None, typer.Option(help="Folder with checkouts RaNA/ and TEAL/.")] = None,
    tests: Annotated[bool, typer.Option(help="Run the tests first; without them nothing is written.")] = True,
    seconds: Annotated[
        float, typer.Option(help="Time for the benchmarks; what is left out is said.")
    ] = 200.0,
    output: Annotated[Path | None, typer.Option(help="CSV; default bench/results/<card>.csv.")] = None,
) -> None:
    """Test and time the ops on this machine's card; without one, run the tests in the interpreter.

    Example:  python -m bench.gpu --only Llama-2-7B --peer-dir ../checkouts
    """
    if not torch.cuda.is_available():
        console.print("no CUDA device: the tests run in Triton's interpreter, and nothing is timed")
        raise typer.Exit(run_tests())
    console.print(conditions())
    if tests and (code := run_tests()) != 0:
        console.print("[red]the tests fail: no numbers")
        raise typer.Exit(code)
    if only and only not in MODELS:
        raise typer.BadParameter(f"{only}: wanted one of {', '.join(MODELS)}", param_hint="--only")
    rows = measure([only] if only else list(DEFAULT), dtype, peer_dir, seconds)
    show(rows)
    if tests:
        path = output or RESULTS / f"{card()}.csv"
        write_csv(path, conditions(), rows)
        console.print(f"wrote {path}")


def pytest_arguments() -> list[list[str]]:
    """What to test, as arguments of pytest. Triton compiles for every shape: there a sample must do."""
    if not torch.cuda.is_available():
        return [["-m", "not slow", "tests/test_triton.py", "tests/test_triton_tune.py"]]
    commands = [["-m", "gpu and not slow", "tests/test_gpu.py"]]
    if backends.installed("triton"):
        commands.append(["-m", "gpu and isa", "-k", "triton_cuda", "tests/test_ops.py"])
    if backends.installed("cuda"):
        commands.append(["-m", "gpu and not slow", "-k", "registered_cuda", "tests/test_ops.py"])
    if find_spec("vllm"):
        commands.append(["-m", "gpu", "tests/stacks/test_vllm.py"])
    return commands


def run_tests() -> int:
    """Run them side by side, print what they say one after another; 0 if all pass."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    running = [
        subprocess.Popen([*pytest, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for command in pytest_arguments()
    ]
    for child in running:
        console.print(child.communicate()[0], markup=False, highlight=False)
    return max(child.returncode for child in running)


@torch.inference_mode()
def measure(models: list[str], dtype: str, peer_dir: Path | None, seconds: float) -> list[Row]:
    torch.manual_seed(0)
    rows, ends, left_out = [], time.monotonic() + seconds, 0
    copy, read = bandwidths()
    limits = {"copy GB/s": copy, "read GB/s": read, "peak GFLOP/s": peak(dtype)}
    console.print("this card: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    # the most telling first, in case time runs out: one token, then several, then many
    grid = [(M, model, dtype) for M in TOKENS for model in models]
    if any(peers.found(peer_dir)) and dtype != "fp16":
        grid = [(1, model, "fp16") for model in models] + grid  # theirs take one token, in float16
    for M, model, dtype in track(grid, "timing", console=console):
        if time.monotonic() > ends:
            left_out += 1
            continue
        for problem in problems(model, M, dtype, peer_dir):
            rows.append(row(problem, limits))
    if left_out:
        console.print(f"[yellow]out of time: {left_out} of {len(grid)} groups were not run")
    return rows


def problems(model: str, M: int, dtype: str, peer_dir: Path | None) -> Iterator[Problem]:
    K, neurons = MODELS[model].linears["up"]
    R = stored_ranks(K, neurons)
    for build in (partial(lowrank, K, neurons, R), partial(masked, neurons, K), partial(mlp, K, neurons, R)):
        yield from build(model, M, dtype, peer_dir)


def lowrank(
    K: int, N: int, R: int, model: str, M: int, dtype: str, peer_dir: Path | None
) -> Iterator[Problem]:
    """The up projection: K -> N with R stored ranks."""
    x = torch.randn(M, K, device=DEVICE).to(DTYPES[dtype])
    pairs = copies(lambda: (weight(R, K, dtype), weight(R, N, dtype)))
    scores = [(x.float() @ B.float().T).abs() for B, _ in pairs]
    dense = [partial(F.linear, x, W) for (W,) in copies(lambda: (weight(N, K, dtype),))]
    for density in DENSITIES:
        thresholds = [threshold_keeping(density, s) for s in scores]
        touched = x.itemsize * (R * K + wanted_rows(scores[0] >= thresholds[0]) * N)
        flops = 2 * M * (R * K + density * R * N)
        problem = Problem("masked_lowrank_linear", model, density, M, dtype, touched, flops)
        static = max(16, round((R * K + density * R * N) / (K + N)))
        problem.contenders = {
            "dense": dense,
            "static": [
                partial(lambda A, B: F.linear(F.linear(x, B), A), A, B)
                for A, B in copies(lambda: (weight(N, static, dtype), weight(static, K, dtype)))  # noqa: B023
            ],
            "masked in torch": [
                partial(lambda B, rows, t: masked_in_torch(F.linear(x, B), rows, t), B, rows, t)
                for (B, rows), t in zip(pairs, thresholds, strict=True)
            ],
            **ours(
                lambda pair, t: ops.masked_lowrank_linear(x, *pair, t), zip(pairs, thresholds, strict=True)
            ),
        }
        if M == 1 and dtype == "fp16":
            for name, checkout in peers.found(peer_dir):
                if name == "RaNA":
                    build = peers.rana_lowrank(checkout)
                    problem.contenders[name] = [
                        build(x, B, rows, float(t)) for (B, rows), t in zip(pairs, thresholds, strict=True)
                    ]
        yield problem


def masked(R: int, N: int, model: str, M: int, dtype: str, peer_dir: Path | None) -> Iterator[Problem]:
    """The down projection: R neurons -> N."""
    h = torch.randn(M, R, device=DEVICE).to(DTYPES[dtype])
    weights = [rows for (rows,) in copies(lambda: (weight(R, N, dtype),))]
    scale = torch.ones(R, device=DEVICE)
    for density in DENSITIES:
        t = threshold_keeping(density, h.float().abs())
        touched = h.itemsize * wanted_rows(h.float().abs() >= t) * N
        problem = Problem("masked_linear", model, density, M, dtype, touched, 2 * M * density * R * N)
        problem.contenders = {
            "dense": [partial(torch.mm, h, rows) for rows in weights],
            "masked in torch": [partial(masked_in_torch, h, rows, t) for rows in weights],
            **ours(lambda rows: ops.masked_linear(h, rows, t, scale), ((rows,) for rows in weights)),  # noqa: B023
        }
        if M == 1 and dtype == "fp16":
            for name, checkout in peers.found(peer_dir):
                build = peers.rana_neurons(checkout) if name == "RaNA" else peers.teal_neurons(checkout)
                problem.contenders[name] = [build(h, rows, float(t)) for rows in weights]
        yield problem


def mlp(
    K: int, neurons: int, R: int, model: str, M: int, dtype: str, peer_dir: Path | None
) -> Iterator[Problem]:
    """The whole MLP, gated; ranks and neurons at the same density."""
    x = torch.randn(M, K, device=DEVICE).to(DTYPES[dtype])
    adapters = copies(
        lambda: (
            weight(2 * R, K, dtype),
            weight(R, neurons, dtype),
            weight(R, neurons, dtype),
            weight(neurons, K, dtype),
        )
    )
    dense = [
        partial(lambda up, gate, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), *weights)
        for weights in copies(
            lambda: (*(weight(neurons, K, dtype) for _ in range(2)), weight(K, neurons, dtype))
        )
    ]
    scale = torch.ones(neurons, device=DEVICE)
    for density in DENSITIES:
        calls, live = [], (0.0, 0.0)
        for B, up, gate, down in adapters:
            h = (x.float() @ B.float().T).abs()
            t = threshold_keeping(density, h)
            z = torch.where(h < t, 0, x.float() @ B.float().T)
            g = (F.silu(z[:, R:] @ gate.float()) * (z[:, :R] @ up.float())).abs()
            down_t = threshold_keeping(density, g)
            live = (wanted_rows(h >= t), wanted_rows(g >= down_t))
            calls.append((B, up, gate, t.expand(2 * R).contiguous(), down, down_t))
        touched = 2 * R * K + live[0] * neurons + live[1] * K
        flops = 2 * M * (2 * R * K + density * (2 * R * neurons + neurons * K))
        problem = Problem("masked_mlp", model, density, M, dtype, x.itemsize * touched, flops)
        problem.contenders = {
            "dense": dense,
            **ours(
                lambda B, up, gate, t, down, down_t: ops.masked_mlp(
                    x, B, up, gate, t, None, None, down, scale, down_t, None, "silu"
                ),
                calls,
            ),
        }
        yield problem


def ours(call: Callable[..., Tensor], weights: Iterator[tuple] | list[tuple]) -> dict[str, list[Call]]:
    """The op served by each backend that is here: {"rana cuda": calls, "rana triton": calls}."""

    def served(backend: str, arguments: tuple) -> Tensor:
        with use_backend(backend):
            return call(*arguments)

    here = [backend for backend in ("cuda", "triton") if backends.installed(backend)]
    prepared = list(weights)
    return {f"rana {b}": [partial(served, b, arguments) for arguments in prepared] for b in here}


def masked_in_torch(h: Tensor, rows: Tensor, threshold: Tensor) -> Tensor:
    return torch.mm(torch.where(h.abs() < threshold, 0, h), rows)


def weight(rows: int, columns: int, dtype: str) -> Tensor:
    return torch.empty(rows, columns, dtype=DTYPES[dtype], device=DEVICE).normal_(std=columns**-0.5)


def copies(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """So many fresh sets of weights that together they are some times the card's cache."""
    first = make()
    size = sum(t.nbytes for t in first)
    return [first, *(make() for _ in range(math.ceil(CACHES * cache_bytes() / size)))]


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def threshold_keeping(density: float, scores: Tensor) -> Tensor:
    """The threshold, [] float32, that a share `density` of the scores reaches, and none of them meets."""
    if density >= 1:
        return torch.zeros((), device=DEVICE)
    ordered, dropped = scores.float().flatten().sort().values, round((1 - density) * scores.numel())
    return (ordered[dropped - 1] + ordered[dropped]) / 2


def wanted_rows(kept: Tensor) -> float:
    """How many rows a decode step has to read for the kept [M, R]: those that some token wants."""
    return float(kept.any(0).sum())


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


def show(rows: list[Row]) -> None:
    hidden = [name for row in rows for name in row if name.endswith((" p20", " p80", "/s", "FLOP"))]
    title = f"rana ops on {card()} (medians, microseconds a call inside a CUDA graph)"
    show_table(console, title, rows, hidden)


def conditions() -> str:
    served = ", ".join(sorted({s["cuda"] for s in backends.serving().values()}))
    parts = [f"{card()}, served by {served}, {versions()}, CUDA {torch.version.cuda}"]
    if backends.installed("triton"):
        parts.append(f"triton {version('triton')}")
    return ", ".join([*parts, f"{date.today()}", f"revision {revision()}"])


def card() -> str:
    return "-".join(torch.cuda.get_device_name(0).lower().split())


if __name__ == "__main__":
    typer.run(main)
