"""The benchmarked layers: a dense linear, a rank adapter, a neuron adapter, and whole MLPs of both kinds."""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.baselines import gated_mlp
from bench.kernels.case import Case, Weights
from bench.kernels.weights import masked, rows_read, threshold_for_live, weight
from rana_kernels import ops


@dataclass(frozen=True)
class Linear(Case):
    """A linear K -> N without a mask, for M tokens."""

    K: int
    N: int
    M: int
    dtype: str
    bits: int | None = None

    op = "linear"
    factors = ()
    scales = {0: "weight_scale"}

    @property
    def name(self) -> str:
        return f"linear {self.K}->{self.N} M={self.M} {self.width}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.N, self.K)]

    @property
    def multiply_adds(self) -> int:
        return self.K * self.N

    def adapter(self, x: Tensor) -> Weights:
        return (weight(self.N, self.K, like=x),)

    def values_read(self, x: Tensor, weights: Weights) -> int:
        return self.multiply_adds

    @staticmethod
    def in_torch(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


@dataclass(frozen=True)
class Lowrank(Case):
    """A rank adapter K -> N that stores R ranks and keeps `live` of them on average, for M tokens."""

    K: int
    N: int
    R: int
    live: int
    M: int
    dtype: str
    bits: int | None = None

    op = "masked_lowrank_linear"
    factors = (1,)
    scales = {0: "B_scale", 1: "rows_scale"}

    @property
    def name(self) -> str:
        return f"lowrank {self.K}->{self.N} R={self.R} live={self.live} M={self.M} {self.width}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.N, self.K)]

    @property
    def multiply_adds(self) -> int:
        return self.R * self.K + self.live * self.N

    def adapter(self, x: Tensor) -> Weights:
        B, rows = weight(self.R, self.K, like=x), weight(self.R, self.N, like=x)
        return B, rows, threshold_for_live(self.live, scores(x, B))

    def values_read(self, x: Tensor, weights: Weights) -> int:
        B, _, threshold = weights
        return self.R * self.K + rows_read(scores(x, B), threshold) * self.N

    @staticmethod
    def in_torch(x: Tensor, B: Tensor, A: Tensor, threshold: Tensor) -> Tensor:
        return F.linear(masked(F.linear(x, B), threshold), A)


@dataclass(frozen=True)
class Neurons(Case):
    """A neuron adapter R -> N that keeps `live` of its inputs on average, for M tokens."""

    R: int
    N: int
    live: int
    M: int
    dtype: str
    bits: int | None = None

    op = "masked_linear"
    factors = (0,)
    scales = {0: "rows_scale"}

    @property
    def name(self) -> str:
        return f"neurons {self.R}->{self.N} live={self.live} M={self.M} {self.width}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.N, self.R)]

    @property
    def multiply_adds(self) -> int:
        return self.live * self.N

    def adapter(self, x: Tensor) -> Weights:
        threshold = threshold_for_live(self.live, x.float().abs())
        return weight(self.R, self.N, like=x), threshold, torch.ones(self.R, device=x.device)

    def values_read(self, x: Tensor, weights: Weights) -> int:
        return rows_read(x.float().abs(), weights[1]) * self.N

    @staticmethod
    def in_torch(h: Tensor, W: Tensor, threshold: Tensor, norms: Tensor) -> Tensor:
        return F.linear(masked(h, threshold), W)


@dataclass(frozen=True)
class Mlp(Case):
    """A gated MLP that stores `ranks` for each of up and gate, and keeps `live` of them and `neurons`.

    Its weights are B, up, gate, threshold, down, norms, down's threshold.
    """

    K: int
    I: int  # noqa: E741
    ranks: int
    live: int
    neurons: int
    M: int
    dtype: str
    bits: int | None = None

    op = "masked_mlp"
    layer = staticmethod(gated_mlp)
    factors = (1, 2, 4)
    scales = {0: "B_scale", 1: "up_scale", 2: "gate_scale", 4: "down_scale"}

    @property
    def name(self) -> str:
        return f"mlp {self.K}x{self.I} R={self.ranks} live={self.live}/{self.neurons} M={self.M} {self.width}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.I, self.K), (self.I, self.K), (self.K, self.I)]

    @property
    def multiply_adds(self) -> int:
        return self._values(2 * self.live, self.neurons)

    def _values(self, rows: int, neurons: int) -> int:
        return 2 * self.ranks * self.K + rows * self.I + neurons * self.K

    def adapter(self, x: Tensor) -> Weights:
        B = weight(2 * self.ranks, self.K, like=x)
        up, gate = (weight(self.ranks, self.I, like=x) for _ in range(2))
        threshold = threshold_for_live(2 * self.live, scores(x, B)).repeat(2 * self.ranks)
        down_threshold = threshold_for_live(self.neurons, _neurons(x, B, up, gate, threshold).abs())
        norms = torch.ones(self.I, device=x.device)
        return B, up, gate, threshold, weight(self.I, self.K, like=x), norms, down_threshold

    def values_read(self, x: Tensor, weights: Weights) -> int:
        B, up, gate, threshold, *_, down_threshold = weights
        neurons = rows_read(_neurons(x, B, up, gate, threshold).abs(), down_threshold)
        return self._values(rows_read(scores(x, B), threshold), neurons)

    def run(self, x: Tensor, *weights: Tensor, served: ModuleType = ops, **scales: Tensor) -> Tensor:
        return served.masked_mlp(x, *weights[:4], None, None, None, *weights[4:], None, "silu", **scales)

    @staticmethod
    def in_torch(x: Tensor, *weights: Tensor) -> Tensor:
        B, up, gate, threshold, down, _, down_threshold = weights
        h_up, h_gate = masked(F.linear(x, B), threshold).chunk(2, dim=-1)
        g = F.silu(F.linear(h_gate, gate)) * F.linear(h_up, up)
        return F.linear(masked(g, down_threshold), down)

    @staticmethod
    def in_parts(x: Tensor, *weights: Tensor) -> Tensor:
        B, up, gate, threshold, down, norms, down_threshold = weights
        R = len(up)
        wide = ops.masked_lowrank_linear(x, B[:R], up, threshold[:R])
        g = F.silu(ops.masked_lowrank_linear(x, B[R:], gate, threshold[R:])) * wide
        return ops.masked_linear(g, down, down_threshold, norms)


@dataclass(frozen=True)
class NeuronMlp(Case):
    """A gated MLP whose up and gate are masked on x, of which they keep `live`, and down keeps `neurons`.

    Its weights are up, gate, threshold, norms, down, down's norms, down's threshold.
    """

    K: int
    I: int  # noqa: E741
    live: int
    neurons: int
    M: int
    dtype: str
    bits: int | None = None

    op = "masked_mlp"
    layer = staticmethod(gated_mlp)
    factors = (0, 1, 4)
    scales = {0: "up_scale", 1: "gate_scale", 4: "down_scale"}

    @property
    def name(self) -> str:
        return f"neuron mlp {self.K}x{self.I} live={self.live}/{self.neurons} M={self.M} {self.width}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.I, self.K), (self.I, self.K), (self.K, self.I)]

    @property
    def multiply_adds(self) -> int:
        return 2 * self.live * self.I + self.neurons * self.K

    def adapter(self, x: Tensor) -> Weights:
        up, gate = (weight(self.K, self.I, like=x) for _ in range(2))
        threshold = threshold_for_live(self.live, x.float().abs())
        g = _masked_neurons(x, up, gate, threshold)
        norms = (torch.ones(size, device=x.device) for size in (self.K, self.I))
        down = weight(self.I, self.K, like=x)
        return up, gate, threshold, next(norms), down, next(norms), threshold_for_live(self.neurons, g.abs())

    def values_read(self, x: Tensor, weights: Weights) -> int:
        up, gate, threshold, *_, down_threshold = weights
        neurons = rows_read(_masked_neurons(x, up, gate, threshold).abs(), down_threshold)
        return 2 * rows_read(x.float().abs(), threshold) * self.I + neurons * self.K

    def run(self, x: Tensor, *weights: Tensor, served: ModuleType = ops, **scales: Tensor) -> Tensor:
        up_gate, masks, down = weights[:2], weights[2:4], weights[4:]
        return served.masked_mlp(x, None, *up_gate, *masks, None, None, *down, None, "silu", **scales)

    @staticmethod
    def in_torch(x: Tensor, *weights: Tensor) -> Tensor:
        up, gate, threshold, _, down, _, down_threshold = weights
        h = masked(x, threshold)
        return F.linear(masked(F.silu(F.linear(h, gate)) * F.linear(h, up), down_threshold), down)


def _masked_neurons(x: Tensor, up: Tensor, gate: Tensor, threshold: Tensor) -> Tensor:
    """Return the input of down behind neuron adapters, in float32."""
    h = masked(x.float(), threshold)
    return F.silu(h @ gate.float()) * (h @ up.float())


def scores(x: Tensor, B: Tensor) -> Tensor:
    return (x.float() @ B.float().T).abs()


def _neurons(x: Tensor, B: Tensor, up: Tensor, gate: Tensor, threshold: Tensor) -> Tensor:
    """Return the input of down, in float32."""
    h_up, h_gate = masked(x.float() @ B.float().T, threshold).chunk(2, dim=-1)
    return F.silu(h_gate @ gate.float()) * (h_up @ up.float())
