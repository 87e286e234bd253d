"""One decode step (one token, bfloat16) of the linears of real block shapes, dense against RaNA.

A step has the products of one transformer block: q, k, v, o and the MLP, without attention and norms. Weights
are random, and thresholds keep the stated share of rows. Live rows therefore follow no pattern, while a
trained model keeps its leading ranks nearly always.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.decode.random_adapters import LIVE_SHARE, halving_threshold, randomize, set_mlp_thresholds
from bench.kernels import timing
from bench.kernels.cases import Model, stored_ranks
from bench.kernels.weights import copies, threshold_for_live, turns
from examples.demo.results import DecodeStep, DensityPoint, DensitySweep, Timing
from rana_kernels import RanaLinear, RanaMLP, ops, use_backend
from rana_kernels.system.huge_pages import use_huge_pages

DTYPE = torch.bfloat16
BYTES = 2


class DenseBlock(nn.Module):
    """The dense linears. q, k and v are one product, which favours dense, because models call three."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        hidden, neurons = shape.hidden, shape.neurons
        self.qkv, self.o = _linear(hidden, hidden + 2 * shape.keys), _linear(hidden, hidden)
        self.gate, self.up, self.down = (
            _linear(hidden, neurons),
            _linear(hidden, neurons),
            _linear(neurons, hidden),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x), self.o(x), self.down(F.silu(self.gate(x)) * self.up(x))

    @property
    def read_bytes(self) -> float:
        return BYTES * sum(p.numel() for p in self.parameters())


class RanaBlock(nn.Module):
    """Joint q, k and v, dense o, and the MLP in one op. All cost `cost_ratio` together."""

    def __init__(self, shape: Model, cost_ratio: float, x: Tensor) -> None:
        super().__init__()
        hidden, width, neurons = shape.hidden, shape.hidden + 2 * shape.keys, shape.neurons
        dense, adapted = hidden * hidden, hidden * (width + 3 * neurons)
        # the adapted linears save the part of o too
        cost_ratio = (cost_ratio * (dense + adapted) - dense) / adapted
        self.qkv, self.o = _rank_adapter(hidden, width, cost_ratio), _linear(hidden, hidden)
        rank = stored_ranks(hidden, neurons, cost_ratio, LIVE_SHARE)
        self.mlp = _random(RanaMLP(hidden, neurons, hidden, rank, rank, "silu", dtype=DTYPE))
        self.qkv.set_threshold(halving_threshold(x.float() @ self.qkv.B.float().T))
        set_mlp_thresholds(self.mlp, x.float(), round(cost_ratio * neurons))
        live = LIVE_SHARE * (self.qkv.rows.numel() + 2 * rank * neurons) + cost_ratio * neurons * hidden
        self.read_bytes = BYTES * (self.qkv.B.numel() + self.mlp.B.numel() + dense + live)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x), self.o(x), self.mlp(x)


def time_block(name: str, shape: Model, cost_ratio: float, rounds: int) -> list[DecodeStep]:
    """Time a block on one thread and on all. `cost_ratio` counts all linears, also o, which stays dense."""
    with torch.inference_mode():
        x = torch.randn(1, shape.hidden, dtype=DTYPE)
        blocks = {"dense": DenseBlock(shape), "rana": RanaBlock(shape, cost_ratio, x)}
        _check(blocks["rana"], x)
        nbytes = {kind: block.read_bytes for kind, block in blocks.items()}
        contenders = {
            kind: turns(partial(_call, x), rotation(block, nbytes[kind])) for kind, block in blocks.items()
        }
    steps = []
    for threads in timing.thread_counts():
        dense, rana = measure(contenders, nbytes, threads, rounds).values()
        reached = nbytes["rana"] / nbytes["dense"]
        steps.append(DecodeStep(name, threads, reached, dense, rana, dense.median / rana.median))
    return steps


def sweep_density(
    K: int, N: int, cost_ratio: float, densities: tuple[float, ...], rounds: int
) -> list[DensitySweep]:
    """Time one rank adapter K -> N at several densities. It costs `cost_ratio` at `LIVE_SHARE`."""
    with torch.inference_mode():
        x, dense, adapter = torch.randn(1, K, dtype=DTYPE), _linear(K, N), _rank_adapter(K, N, cost_ratio)
        scores, rank = (x.float() @ adapter.B.float().T).abs(), len(adapter.rows)
        nbytes = {"dense": BYTES * K * N} | {d: BYTES * rank * (K + d * N) for d in densities}
        contenders = {"dense": turns(partial(_call, x), rotation(dense, nbytes["dense"]))}
        # all densities go on through the same copies, so that none finds in the cache what the last one read
        following = itertools.cycle(rotation(adapter, min(nbytes.values())))
    for density in densities:
        threshold = threshold_for_live(round(density * rank), scores)
        contenders[density] = partial(_masked, x, following, threshold)
    sweeps = []
    for threads in timing.thread_counts():
        timed = measure(contenders, nbytes, threads, rounds)
        points = [DensityPoint(d, nbytes[d] / nbytes["dense"], timed[d]) for d in densities]
        sweeps.append(DensitySweep(K, N, rank, threads, timed["dense"], points))
    return sweeps


def measure(
    contenders: dict[object, Callable[[], object]], nbytes: dict[object, float], threads: int, rounds: int
) -> dict[object, Timing]:
    """Time contenders in turns. `nbytes`: the bytes that a step of each must read."""
    with torch.inference_mode():
        found = timing.alternate(contenders, threads, rounds)
    return {name: Timing(t.median, t.p20, t.p80, nbytes[name] / t.median / 1e3) for name, t in found.items()}


def rotation(module: nn.Module, nbytes: float) -> list[tuple[nn.Module]]:
    """Return so many copies that the last cache does not hold the `nbytes` that a step reads of each.

    All lie on huge pages, as `compress` leaves a model.
    """
    made = copies(lambda: (copy.deepcopy(module),), nbytes)
    for (part,) in made:
        use_huge_pages(part)
    return made


def _call(x: Tensor, module: nn.Module) -> object:
    return module(x)


def _masked(x: Tensor, following: Iterator[tuple[nn.Module]], threshold: Tensor) -> Tensor:
    (adapter,) = next(following)
    return ops.masked_lowrank_linear(x, adapter.B, adapter.rows, threshold)


def _linear(K: int, N: int) -> nn.Linear:
    return _random(nn.Linear(K, N, bias=False, dtype=DTYPE, device="meta").to_empty(device="cpu"))


def _rank_adapter(K: int, N: int, cost_ratio: float) -> RanaLinear:
    return _random(RanaLinear(K, N, stored_ranks(K, N, cost_ratio, LIVE_SHARE), dtype=DTYPE))


def _random(module: nn.Module) -> nn.Module:
    randomize(module)
    return module.requires_grad_(False)


def _check(block: RanaBlock, x: Tensor) -> None:
    """Raise RuntimeError if a step differs from the reference: then its time is worth nothing."""
    with use_backend("reference"):
        wanted = block(x)
    for y, exact in zip(block(x), wanted, strict=True):
        error = ((y - exact).float().norm() / exact.float().norm()).item()
        if not error < 0.01:
            raise RuntimeError(f"the kernels differ from the reference by {error:.2%}: not timed")
