"""The ops at the sizes of known models, each with its baselines, as calls on copies of their weights."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import DTYPES
from bench.gpu import peers
from bench.gpu.timing import DEVICE, Call
from bench.models import KEEP, MODELS, stored_ranks
from rana_kernels import backends, ops
from rana_kernels.backends import use_backend

DENSITIES = (KEEP, 1.0, 0.25, 0.1)
CACHES = 3  # times the card's cache that the copies of a weight take


@dataclass(frozen=True)
class Request:
    """What is wanted: the linears of a model for M tokens. `red`: "backend:op" that is not to be timed.

    peer_dir   a folder with the kernels that others published, or None
    """

    model: str
    M: int
    dtype: str
    red: frozenset[str] = frozenset()
    peer_dir: Path | None = None

    @property
    def peers(self) -> dict[str, Path]:
        """Theirs take one token, in float16."""
        return dict(peers.found(self.peer_dir)) if self.M == 1 and self.dtype == "fp16" else {}


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


def problems(request: Request) -> Iterator[Problem]:
    K, neurons = MODELS[request.model].linears["up"]
    R = stored_ranks(K, neurons)
    yield from lowrank(K, neurons, R, request)
    yield from masked(neurons, K, request)
    yield from mlp(K, neurons, R, request)


def lowrank(K: int, N: int, R: int, request: Request) -> Iterator[Problem]:
    """The up projection: K -> N with R stored ranks."""
    M, dtype = request.M, request.dtype
    x = torch.randn(M, K, device=DEVICE).to(DTYPES[dtype])
    pairs = copies(lambda: (weight(R, K, dtype), weight(R, N, dtype)))
    scores = [(x.float() @ B.float().T).abs() for B, _ in pairs]
    dense = [partial(F.linear, x, W) for (W,) in copies(lambda: (weight(N, K, dtype),))]
    for density in DENSITIES:
        thresholds = [threshold_keeping(density, s) for s in scores]
        touched = x.itemsize * (R * K + wanted_rows(scores[0] >= thresholds[0]) * N)
        flops = 2 * M * (R * K + density * R * N)
        problem = Problem("masked_lowrank_linear", request.model, density, M, dtype, touched, flops)
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
                problem,
                request.red,
                lambda pair, t: ops.masked_lowrank_linear(x, *pair, t),
                zip(pairs, thresholds, strict=True),
            ),
        }
        if "RaNA" in request.peers:
            build = peers.rana_lowrank(request.peers["RaNA"])
            problem.contenders["RaNA"] = [
                build(x, B, rows, float(t)) for (B, rows), t in zip(pairs, thresholds, strict=True)
            ]
        yield problem


def masked(R: int, N: int, request: Request) -> Iterator[Problem]:
    """The down projection: R neurons -> N."""
    M, dtype = request.M, request.dtype
    h = torch.randn(M, R, device=DEVICE).to(DTYPES[dtype])
    weights = [rows for (rows,) in copies(lambda: (weight(R, N, dtype),))]
    scale = torch.ones(R, device=DEVICE)
    for density in DENSITIES:
        t = threshold_keeping(density, h.float().abs())
        touched = h.itemsize * wanted_rows(h.float().abs() >= t) * N
        flops = 2 * M * density * R * N
        problem = Problem("masked_linear", request.model, density, M, dtype, touched, flops)
        problem.contenders = {
            "dense": [partial(torch.mm, h, rows) for rows in weights],
            "masked in torch": [partial(masked_in_torch, h, rows, t) for rows in weights],
            **ours(
                problem,
                request.red,
                lambda rows: ops.masked_linear(h, rows, t, scale),  # noqa: B023
                ((rows,) for rows in weights),
            ),
        }
        for name, checkout in request.peers.items():
            build = peers.rana_neurons(checkout) if name == "RaNA" else peers.teal_neurons(checkout)
            problem.contenders[name] = [build(h, rows, float(t)) for rows in weights]
        yield problem


def mlp(K: int, neurons: int, R: int, request: Request) -> Iterator[Problem]:
    """The whole MLP, gated; ranks and neurons at the same density."""
    M, dtype = request.M, request.dtype
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
        problem = Problem("masked_mlp", request.model, density, M, dtype, x.itemsize * touched, flops)
        problem.contenders = {
            "dense": dense,
            **ours(
                problem,
                request.red,
                lambda B, up, gate, t, down, down_t: ops.masked_mlp(
                    x, B, up, gate, t, None, None, down, scale, down_t, None, "silu"
                ),
                calls,
            ),
        }
        yield problem


def ours(
    problem: Problem, red: frozenset[str], call: Callable[..., Tensor], weights: Iterable[tuple]
) -> dict[str, list[Call]]:
    """The op served by each backend that is here and not red: {"rana cuda": calls, "rana triton": calls}."""

    def served(backend: str, arguments: tuple) -> Tensor:
        with use_backend(backend):
            return call(*arguments)

    names = [name for name in ("cuda", "triton") if f"{name}:{problem.op}" not in red]
    here = [name for name in names if backends.installed(name)]
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
