"""One decode step (one token, bfloat16) of the linears of real block shapes, dense against RaNA.

A step is what one transformer block multiplies: q, k, v, o and the MLP, without attention and norms.
Weights are random, and thresholds are set so that the stated share of rows is kept: which rows are
kept follows no pattern, where in a trained model the leading ranks are kept nearly always.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.results import DecodeStep, DensityPoint, DensitySweep
from examples.demo.timing import measure, rotation, thread_counts
from rana_kernels import RanaLinear, RanaMLP, ops, use_backend

DTYPE = torch.bfloat16
BYTES = 2
LIVE_SHARE = 0.5  # of the stored ranks, in the adapters timed here


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
        rank = _rank(hidden, neurons, keep)
        self.mlp = _random(RanaMLP(hidden, neurons, hidden, rank, rank, "silu", dtype=DTYPE))
        self.qkv.set_threshold(_threshold(_rank_values(x, self.qkv.B), LIVE_SHARE))
        _set_mlp_thresholds(self.mlp, x, keep)
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
            name: [partial(copy, x) for copy in rotation(block, nbytes[name])]
            for name, block in blocks.items()
        }
    steps = []
    for threads in thread_counts():
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
        h, rank = _rank_values(x, adapter.B), len(adapter.rows)
        thresholds = {density: _threshold(h, density) for density in densities}
        nbytes = {"dense": BYTES * K * N} | {d: BYTES * rank * (K + d * N) for d in densities}
        contenders = {"dense": [partial(copy, x) for copy in rotation(dense, nbytes["dense"])]}
        copies = rotation(adapter, min(nbytes.values()))
    for density, threshold in thresholds.items():
        contenders[density] = [
            partial(ops.masked_lowrank_linear, x, copy.B, copy.rows, threshold) for copy in copies
        ]
    sweeps = []
    for threads in thread_counts():
        timed = measure(contenders, nbytes, threads, rounds)
        points = [DensityPoint(d, nbytes[d] / nbytes["dense"], timed[d]) for d in densities]
        sweeps.append(DensitySweep(K, N, rank, threads, timed["dense"], points))
    return sweeps


def _rank(K: int, N: int, keep: float) -> int:
    """Stored ranks, a multiple of 16, that come to `keep` of K·N when `LIVE_SHARE` of them is live."""
    return max(16, round(keep * K * N / (K + LIVE_SHARE * N) / 16) * 16)


def _linear(K: int, N: int) -> nn.Linear:
    return _random(nn.Linear(K, N, bias=False, dtype=DTYPE, device="meta").to_empty(device="cpu"))


def _rank_adapter(K: int, N: int, keep: float) -> RanaLinear:
    return _random(RanaLinear(K, N, _rank(K, N, keep), dtype=DTYPE))


def _random(module: nn.Module) -> nn.Module:
    """Weights of a size that keeps values near 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=max(parameter.shape) ** -0.5)
    return module.requires_grad_(False)


def _rank_values(x: Tensor, B: Tensor) -> Tensor:
    return (x.float() @ B.float().T).flatten()


def _threshold(score: Tensor, share: float) -> Tensor:
    """The threshold, float32 [], between the scores that are kept and those that are not."""
    kept = round(share * score.numel())
    if kept == score.numel():
        return torch.tensor(0.0)
    ordered = score.abs().sort(descending=True).values
    return ordered[kept - 1 : kept + 1].mean()


def _set_mlp_thresholds(mlp: RanaMLP, x: Tensor, live_neurons: float) -> None:
    """Half of the ranks of up and of gate, and `live_neurons` of the neurons, for this input."""
    h = _rank_values(x, mlp.B)
    up, gate = h.chunk(2)
    thresholds = [_threshold(part, LIVE_SHARE) for part in (up, gate)]
    mlp.set_threshold(torch.cat([t.expand(len(up)) for t in thresholds]))
    up, gate = (torch.where(part.abs() < t, 0, part) for part, t in zip((up, gate), thresholds, strict=True))
    g = F.silu(gate @ mlp.gate_proj.rows.float()) * (up @ mlp.up_proj.rows.float())
    scale = mlp.down_proj.rows.float().norm(dim=1)
    mlp.down_proj.scale.copy_(scale)
    mlp.down_proj.set_threshold(_threshold(g * scale, live_neurons))


def _check(block: RanaBlock, x: Tensor) -> None:
    """No time is worth printing of a step that computes something else than the reference does."""
    with use_backend("reference"):
        wanted = block(x)
    for y, exact in zip(block(x), wanted, strict=True):
        error = ((y - exact).float().norm() / exact.float().norm()).item()
        if not error < 0.01:
            raise RuntimeError(f"the kernels differ from the reference by {error:.2%}: not timed")
