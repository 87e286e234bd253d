"""The benchmarked layers: a rank adapter, a neuron adapter and a whole MLP, each beside its baselines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.baselines import Layer, baselines, gated_mlp, one_linear
from bench.kernels.weights import (
    DTYPES,
    Call,
    copies,
    far,
    masked,
    rows_read,
    threshold_for_live,
    transposed,
    turns,
    weight,
)  # fmt: skip
from rana_kernels import ops
from rana_kernels.ops import reference

Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contenders:
    """Calls that take turns over copies of their weights.

    bytes   of weights that ours must read: B, and the rows that any token keeps
    flops   of ours: two a multiply-add, for the rows that each token keeps
    error   of ours, ‖y - exact‖ / ‖exact‖ against the reference in float64; computed when called
    """

    calls: dict[str, Call]
    bytes: float
    flops: float
    error: Callable[[], float]


class Case:
    """One adapter for M tokens. Its tensors, `Weights`, are the arguments of its op, in their order.

    op              the op's name
    layer           the dense layer that it replaces
    factors         the places of its weights that dense products take transposed
    shapes          [N, K] of the dense weights
    multiply_adds   of one token, on average
    adapter         x -> random weights, with thresholds at which x keeps as many rows as the case says
    values_read     x, weights -> how many values of the weights x must read
    in_torch        x, *weights -> the op in torch's own operations, from transposed factors
    in_parts        the same in separate ops, or None
    """

    name: str
    M: int
    dtype: str
    op: str
    layer: Layer = staticmethod(one_linear)
    factors: tuple[int, ...]
    shapes: list[tuple[int, int]]
    multiply_adds: int
    adapter: Callable[[Tensor], Weights]
    values_read: Callable[[Tensor, Weights], int]
    in_torch: Callable[..., Tensor]
    in_parts: Callable[..., Tensor] | None = None

    @property
    def cost_ratio(self) -> float:
        return self.multiply_adds / sum(N * K for N, K in self.shapes)

    def inputs(self, device: str = "cpu") -> Tensor:
        return torch.randn(self.M, self.shapes[0][1], device=device).to(DTYPES[self.dtype])

    def run(self, x: Tensor, *weights: Tensor, served: ModuleType = ops) -> Tensor:
        return getattr(served, self.op)(x, *weights)

    def contenders(self) -> Contenders:
        x, bytes_each = self.inputs(), DTYPES[self.dtype].itemsize
        ours = copies(partial(self.adapter, x), bytes_each * self.multiply_adds)

        def for_torch() -> Weights:
            weights = self.adapter(x)
            return tuple(transposed(w) if i in self.factors else w for i, w in enumerate(weights))

        def error() -> float:
            exact = self.run(x.double(), *(t.double() for t in ours[0]), served=reference)
            return float((self.run(x, *ours[0]).double() - exact).norm() / exact.norm())

        calls = {
            **baselines(x, self.shapes, self.cost_ratio, self.layer),
            "masked in torch": turns(partial(self.in_torch, x), copies(for_torch)),
            "rana": turns(partial(self.run, x), ours),
        }
        if self.in_parts:
            calls["parts"] = turns(partial(self.in_parts, x), far(ours))
        touched = bytes_each * self.values_read(x, ours[0])
        return Contenders(calls, touched, 2 * self.M * self.multiply_adds, error)


@dataclass(frozen=True)
class Lowrank(Case):
    """A rank adapter K -> N that stores R ranks and keeps `live` of them on average, for M tokens."""

    K: int
    N: int
    R: int
    live: int
    M: int
    dtype: str

    op = "masked_lowrank_linear"
    factors = (1,)

    @property
    def name(self) -> str:
        return f"lowrank {self.K}->{self.N} R={self.R} live={self.live} M={self.M} {self.dtype}"

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

    op = "masked_linear"
    factors = (0,)

    @property
    def name(self) -> str:
        return f"neurons {self.R}->{self.N} live={self.live} M={self.M} {self.dtype}"

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

    op = "masked_mlp"
    layer = staticmethod(gated_mlp)
    factors = (1, 2, 4)

    @property
    def name(self) -> str:
        return f"mlp {self.K}x{self.I} R={self.ranks} live={self.live}/{self.neurons} M={self.M} {self.dtype}"

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

    def run(self, x: Tensor, *weights: Tensor, served: ModuleType = ops) -> Tensor:
        return served.masked_mlp(x, *weights[:4], None, None, None, *weights[4:], None, "silu")

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


def scores(x: Tensor, B: Tensor) -> Tensor:
    return (x.float() @ B.float().T).abs()


def _neurons(x: Tensor, B: Tensor, up: Tensor, gate: Tensor, threshold: Tensor) -> Tensor:
    """Return the input of down, in float32."""
    h_up, h_gate = masked(x.float() @ B.float().T, threshold).chunk(2, dim=-1)
    return F.silu(h_gate @ gate.float()) * (h_up @ up.float())
