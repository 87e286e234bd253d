"""The ops at the sizes of known models, each with its baselines, as calls on copies of their weights."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import peers
from bench.gpu.timing import DEVICE, Call
from bench.kernels.baselines import DTYPES, low_rank, static_rank
from bench.kernels.cases import COST_RATIO, MODELS, RANK_MULTIPLE, stored_ranks
from bench.kernels.mlp import dense as dense_mlp
from rana_kernels import backends, ops
from rana_kernels.backends import use_backend

DENSITIES = (COST_RATIO, 1.0, 0.25, 0.1)
CACHES = 3  # the copies of a weight take this many times the card's cache


@dataclass
class Problem:
    """One op at one size. `contenders` by name: each is one call for each copy of its weights.

    bytes    of weights that ours must read, with the masks as they are
    flops    of ours: two a multiply-add, for the rows that each token keeps
    """

    op: str
    model: str
    density: float
    M: int
    dtype: str
    bytes: float
    flops: float
    contenders: dict[str, list[Call]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The linears of a model for M tokens. `red`: "backend:op" that is not to be timed.

    peer_dir   a folder with the kernels that others published, or None
    """

    model: str
    M: int
    dtype: str
    red: frozenset[str] = frozenset()
    peer_dir: Path | None = None

    @property
    def peers(self) -> dict[str, Path]:
        """The kernels of others take one token, in float16."""
        return dict(peers.found(self.peer_dir)) if self.M == 1 and self.dtype == "fp16" else {}

    def problem(self, op: str, density: float, values: float, multiply_adds: float) -> Problem:
        """Return a problem, yet without contenders, that reads `values` weights."""
        touched = DTYPES[self.dtype].itemsize * values
        return Problem(op, self.model, density, self.M, self.dtype, touched, 2 * self.M * multiply_adds)

    def inputs(self, size: int) -> Tensor:
        return torch.randn(self.M, size, device=DEVICE).to(DTYPES[self.dtype])

    def weights(self, *shapes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        """Return so many sets of random weights of `shapes` that together they exceed the card's cache."""

        def make() -> tuple[Tensor, ...]:
            return tuple(weight(*shape, self.dtype) for shape in shapes)

        first = make()
        size = sum(t.nbytes for t in first)
        return [first, *(make() for _ in range(math.ceil(CACHES * cache_bytes() / size)))]


def problems(request: Request) -> Iterator[Problem]:
    K, neurons = MODELS[request.model].linears["up"]
    R = stored_ranks(K, neurons)
    yield from lowrank(K, neurons, R, request)
    yield from masked(neurons, K, request)
    yield from mlp(K, neurons, R, request)


def lowrank(K: int, N: int, R: int, request: Request) -> Iterator[Problem]:
    """Yield the up projection, K -> N with R stored ranks, at every density."""
    x = request.inputs(K)
    pairs = request.weights((R, K), (R, N))
    scores = [(x.float() @ B.float().T).abs() for B, _ in pairs]
    dense = [partial(F.linear, x, W) for (W,) in request.weights((N, K))]
    for density in DENSITIES:
        adapters = [(*pair, threshold_for_density(density, s)) for pair, s in zip(pairs, scores, strict=True)]
        rows, work = rows_read(scores[0] >= adapters[0][2]), R * K + density * R * N
        problem = request.problem("masked_lowrank_linear", density, R * K + rows * N, work)
        rank = max(RANK_MULTIPLE, static_rank(work / (K * N), K, N))
        problem.contenders = {
            "dense": dense,
            "static": [partial(low_rank, x, B, A) for A, B in request.weights((N, rank), (rank, K))],
            "masked in torch": [
                partial(lambda B, rows, t: masked_in_torch(F.linear(x, B), rows, t), *w) for w in adapters
            ],
            **ours(problem, request.red, partial(ops.masked_lowrank_linear, x), adapters),
        }
        if "RaNA" in request.peers:
            build = peers.rana_lowrank(request.peers["RaNA"])
            problem.contenders["RaNA"] = [build(x, B, rows, float(t)) for B, rows, t in adapters]
        yield problem


def masked(R: int, N: int, request: Request) -> Iterator[Problem]:
    """Yield the down projection, R neurons -> N, at every density."""
    h = request.inputs(R)
    weights = request.weights((R, N))
    norms = torch.ones(R, device=DEVICE)
    for density in DENSITIES:
        t = threshold_for_density(density, h.float().abs())
        touched = rows_read(h.float().abs() >= t) * N
        problem = request.problem("masked_linear", density, touched, density * R * N)
        problem.contenders = {
            "dense": [partial(torch.mm, h, rows) for (rows,) in weights],
            "masked in torch": [partial(masked_in_torch, h, rows, t) for (rows,) in weights],
            **ours(problem, request.red, ops.masked_linear, ((h, rows, t, norms) for (rows,) in weights)),
        }
        for name, checkout in request.peers.items():
            build = peers.rana_neurons(checkout) if name == "RaNA" else peers.teal_neurons(checkout)
            problem.contenders[name] = [build(h, rows, float(t)) for (rows,) in weights]
        yield problem


def mlp(K: int, neurons: int, R: int, request: Request) -> Iterator[Problem]:
    """Yield the whole gated MLP, with ranks and neurons at the same density, for every density."""
    x = request.inputs(K)
    adapters = request.weights((2 * R, K), (R, neurons), (R, neurons), (neurons, K))
    shapes = ((neurons, K), (neurons, K), (K, neurons))
    dense = [partial(dense_mlp, x, *weights) for weights in request.weights(*shapes)]
    norms = torch.ones(neurons, device=DEVICE)
    for density in DENSITIES:
        calls, live = [], (0.0, 0.0)
        for B, up, gate, down in adapters:
            h = x.float() @ B.float().T
            t = threshold_for_density(density, h.abs())
            z = torch.where(h.abs() < t, 0, h)
            g = (F.silu(z[:, R:] @ gate.float()) * (z[:, :R] @ up.float())).abs()
            down_t = threshold_for_density(density, g)
            live = (rows_read(h.abs() >= t), rows_read(g >= down_t))
            thresholds = t.expand(2 * R).contiguous()
            calls.append((x, B, up, gate, thresholds, None, None, down, norms, down_t, None, "silu"))
        work = 2 * R * K + density * (2 * R * neurons + neurons * K)
        problem = request.problem("masked_mlp", density, 2 * R * K + live[0] * neurons + live[1] * K, work)
        problem.contenders = {"dense": dense, **ours(problem, request.red, ops.masked_mlp, calls)}
        yield problem


def ours(
    problem: Problem, red: frozenset[str], op: Callable[..., Tensor], arguments: Iterable[tuple]
) -> dict[str, list[Call]]:
    """Return the op by each installed backend that is not red: {"rana cuda": calls, "rana triton": calls}."""

    def served(backend: str, *given: object) -> Tensor:
        with use_backend(backend):
            return op(*given)

    names = [name for name in ("cuda", "triton") if f"{name}:{problem.op}" not in red]
    prepared = list(arguments)
    return {
        f"rana {backend}": [partial(served, backend, *given) for given in prepared]
        for backend in names
        if backends.installed(backend)
    }


def masked_in_torch(h: Tensor, rows: Tensor, threshold: Tensor) -> Tensor:
    return torch.mm(torch.where(h.abs() < threshold, 0, h), rows)


def weight(rows: int, columns: int, dtype: str) -> Tensor:
    return torch.empty(rows, columns, dtype=DTYPES[dtype], device=DEVICE).normal_(std=columns**-0.5)


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def threshold_for_density(density: float, scores: Tensor) -> Tensor:
    """Return the threshold, [] float32, that a share `density` of the scores exceed."""
    if density >= 1:
        return torch.zeros((), device=DEVICE)
    ordered, dropped = scores.float().flatten().sort().values, round((1 - density) * scores.numel())
    return (ordered[dropped - 1] + ordered[dropped]) / 2


def rows_read(mask: Tensor) -> float:
    """Return how many rows a decode step reads for a mask [M, R]: those that at least one token keeps."""
    return float(mask.any(0).sum())
