"""The benchmarked linears: a rank adapter and a neuron adapter, each with its baselines."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.baselines import DTYPES, LINEAR, Contenders, baselines, difference, masked
from bench.kernels.weights import copies, rows_read, threshold_for_live, turns, weight
from rana_kernels import ops
from rana_kernels.ops import reference


@dataclass(frozen=True)
class Lowrank:
    """A rank adapter K -> N that stores R ranks and keeps `live` of them on average, for M tokens."""

    K: int
    N: int
    R: int
    live: int
    M: int
    dtype: str

    @property
    def cost_ratio(self) -> float:
        return (self.R * self.K + self.live * self.N) / (self.K * self.N)

    @property
    def name(self) -> str:
        return f"lowrank {self.K}->{self.N} R={self.R} live={self.live} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.M, self.K).to(dtype)

        def scores(B: Tensor) -> Tensor:
            return (x.float() @ B.float().T).abs()

        def adapter(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
            B = weight(self.R, self.K, dtype)
            return B, weight(*shape, dtype), threshold_for_live(self.live, scores(B))

        def masked_in_torch(B: Tensor, A: Tensor, threshold: Tensor) -> Tensor:
            return F.linear(masked(F.linear(x, B), threshold), A)

        def error() -> float:
            exact = reference.masked_lowrank_linear(x.double(), *(t.double() for t in ours[0]))
            return difference(ops.masked_lowrank_linear(x, *ours[0]), exact)

        live = self.R * self.K + self.live * self.N
        ours = copies(lambda: adapter(self.R, self.N), dtype.itemsize * live)
        calls = {
            **baselines(x, [(self.N, self.K)], self.cost_ratio, LINEAR),
            "masked in torch": turns(masked_in_torch, copies(lambda: adapter(self.N, self.R))),
            "rana": turns(lambda B, rows, t: ops.masked_lowrank_linear(x, B, rows, t), ours),
        }
        touched = self.R * self.K + rows_read(scores(ours[0][0]), ours[0][2]) * self.N
        return Contenders(calls, dtype.itemsize * touched, 2 * self.M * live, error)


@dataclass(frozen=True)
class Neurons:
    """A neuron adapter R -> N that keeps `live` of its inputs on average, for M tokens."""

    R: int
    N: int
    live: int
    M: int
    dtype: str

    @property
    def cost_ratio(self) -> float:
        return self.live / self.R

    @property
    def name(self) -> str:
        return f"neurons {self.R}->{self.N} live={self.live} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        h, norms = torch.randn(self.M, self.R).to(dtype), torch.ones(self.R)
        scores = h.float().abs()
        threshold = threshold_for_live(self.live, scores)
        touched = dtype.itemsize * rows_read(scores, threshold) * self.N
        ours = copies(lambda: (weight(self.R, self.N, dtype),), touched)

        def error() -> float:
            rows = ours[0][0]
            exact = reference.masked_linear(h.double(), rows.double(), threshold.double(), norms.double())
            return difference(ops.masked_linear(h, rows, threshold, norms), exact)

        calls = {
            **baselines(h, [(self.N, self.R)], self.cost_ratio, LINEAR),
            "masked in torch": turns(
                lambda W: F.linear(masked(h, threshold), W), copies(lambda: (weight(self.N, self.R, dtype),))
            ),
            "rana": turns(lambda rows: ops.masked_linear(h, rows, threshold, norms), ours),
        }
        return Contenders(calls, touched, 2 * self.M * self.live * self.N, error)
