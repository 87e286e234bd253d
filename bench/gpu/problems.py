"""The ops at the sizes of known models, each with its baselines, as calls on copies of their weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import peers
from bench.kernels.baselines import low_rank, static_rank
from bench.kernels.cases import COST_RATIO, MODELS, Case, Lowrank, Neurons, cases
from bench.kernels.layers import Weights
from bench.kernels.weights import DTYPES, Call, copies, masked, weight
from rana_kernels import backends
from rana_kernels.backends import use_backend

DEVICE = "cuda"
LAYERS = ("up", "down", "mlp")
DENSITIES = (COST_RATIO, 1.0, 0.25, 0.1)
CACHES = 3  # the copies of a weight take this many times the card's cache
BACKENDS = ("cuda", "triton")
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
