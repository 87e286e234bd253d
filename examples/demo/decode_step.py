"""One decode step (one token, bfloat16) of the linears of real block shapes, dense against RaNA.

A step is what one transformer block multiplies: q, k, v, o and the MLP, without attention and norms.
Weights are random, and thresholds are set so that the stated share of rows is kept: which rows are
kept follows no pattern, where in a trained model the leading ranks are kept nearly always.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import timing
from bench.decode.random_adapters import LIVE_SHARE, halving, randomize, set_mlp_thresholds
from bench.models import stored_ranks
from bench.weights import copies, threshold_keeping, turns
from examples.demo.results import DecodeStep, DensityPoint, DensitySweep, Timing
from rana_kernels import RanaLinear, RanaMLP, ops, use_backend
from rana_kernels.system.huge_pages import use_huge_pages

DTYPE = torch.bfloat16
BYTES = 2


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a gated block; `kv` is the width of k and of v."""

    name: str
    hidden: int
    kv: int
    neurons: int


LLAMA_1B = BlockShape("Llama-3.2-1B", hidden=2048, kv=512, neurons=8192)
LLAMA_7B = BlockShape("Llama-2-7B", hidden=4096, kv=4096, neurons=11008)


class DenseBlock(nn.Module):
    """q, k and v are one product here, which favours dense: models call three."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        hidden, neurons = shape.hidden, shape.neurons
        self.qkv, self.o = _linear(hidden, hidden + 2 * shape.kv), _linear(hidden, hidden)
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
    """q, k and v decomposed jointly, o dense, the MLP one op; `keep` is over all of them."""

    def __init__(self, shape: BlockShape, keep: float, x: Tensor) -> None:
        super().__init__()
        hidden, width, neurons = shape.hidden, shape.hidden + 2 * shape.kv, shape.neurons
        dense, adapted = hidden * hidden, hidden * (width + 3 * neurons)
        # the adapted linears take the cut of o too
        keep = (keep * (dense + adapted) - dense) / adapted
        self.qkv, self.o = _rank_adapter(hidden, width, keep), _linear(hidden, hidden)
        rank = stored_ranks(hidden, neurons, keep, LIVE_SHARE)
        self.mlp = _random(RanaMLP(hidden, neurons, hidden, rank, rank, "silu", dtype=DTYPE))
        self.qkv.set_threshold(halving(x.float() @ self.qkv.B.float().T))
        set_mlp_thresholds(self.mlp, x.float(), round(keep * neurons))
        live = LIVE_SHARE * (self.qkv.rows.numel() + 2 * rank * neurons) + keep * neurons * hidden
        self.read_bytes = BYTES * (self.qkv.B.numel() + self.mlp.B.numel() + dense + live)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x), self.o(x), self.mlp(x)


def time_block(shape: BlockShape, keep: float, rounds: int) -> list[DecodeStep]:
    """On one thread and on all; `keep` is over all linears, o among them and dense."""
    with torch.inference_mode():
        x = torch.randn(1, shape.hidden, dtype=DTYPE)
        blocks = {"dense": DenseBlock(shape), "rana": RanaBlock(shape, keep, x)}
        _check(blocks["rana"], x)
        nbytes = {name: block.read_bytes for name, block in blocks.items()}
        contenders = {
            name: turns(partial(_call, x), rotation(block, nbytes[name])) for name, block in blocks.items()
        }
    steps = []
    for threads in timing.thread_counts():
        dense, rana = measure(contenders, nbytes, threads, rounds).values()
        reached = nbytes["rana"] / nbytes["dense"]
        steps.append(DecodeStep(shape.name, threads, reached, dense, rana, dense.median / rana.median))
    return steps


def sweep_density(
    K: int, N: int, keep: float, densities: tuple[float, ...], rounds: int
) -> list[DensitySweep]:
    """One rank adapter K -> N, of the size that comes to `keep` at `LIVE_SHARE`, at several densities."""
    with torch.inference_mode():
        x, dense, adapter = torch.randn(1, K, dtype=DTYPE), _linear(K, N), _rank_adapter(K, N, keep)
        scores, rank = (x.float() @ adapter.B.float().T).abs(), len(adapter.rows)
        nbytes = {"dense": BYTES * K * N} | {d: BYTES * rank * (K + d * N) for d in densities}
        contenders = {"dense": turns(partial(_call, x), rotation(dense, nbytes["dense"]))}
        # the densities take their turns through the same copies, so that none finds what the last one read
        following = itertools.cycle(rotation(adapter, min(nbytes.values())))
    for density in densities:
        threshold = threshold_keeping(round(density * rank), scores)
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
    """Contenders taking turns; `nbytes`: what a step of each must read."""
    with torch.inference_mode():
        found = timing.alternate(contenders, threads, rounds)
    return {name: Timing(t.median, t.p20, t.p80, nbytes[name] / t.median / 1e3) for name, t in found.items()}


def rotation(module: nn.Module, nbytes: float) -> list[tuple[nn.Module]]:
    """Copies of it, of each of which a step reads `nbytes`: more than the last cache holds of all. On huge
    pages, as `compress` leaves a model, the dense ones too."""
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


def _rank_adapter(K: int, N: int, keep: float) -> RanaLinear:
    return _random(RanaLinear(K, N, stored_ranks(K, N, keep, LIVE_SHARE), dtype=DTYPE))


def _random(module: nn.Module) -> nn.Module:
    randomize(module)
    return module.requires_grad_(False)


def _check(block: RanaBlock, x: Tensor) -> None:
    """No time is worth printing of a step that computes something else than the reference does."""
    with use_backend("reference"):
        wanted = block(x)
    for y, exact in zip(block(x), wanted, strict=True):
        error = ((y - exact).float().norm() / exact.float().norm()).item()
        if not error < 0.01:
            raise RuntimeError(f"the kernels differ from the reference by {error:.2%}: not timed")
