"""The benchmarked linears: a rank adapter and a neuron adapter against what does the same job."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import (
    DTYPES,
    Contenders,
    can_pack,
    compiled,
    difference,
    low_rank,
    masked,
    packed,
    packed_linear,
    packed_low_rank,
    static_rank,
)
from bench.weights import copies, far, threshold_keeping, turns, wanted, weight
from rana_kernels import ops
from rana_kernels.ops import reference


@dataclass(frozen=True)
class Lowrank:
    """A rank adapter K -> N of R stored ranks, `live` of them kept, for M tokens."""

    K: int
    N: int
    R: int
    live: int
    M: int
    dtype: str

    @property
    def keep(self) -> float:
        return (self.R * self.K + self.live * self.N) / (self.K * self.N)

    @property
    def name(self) -> str:
        return f"lowrank {self.K}->{self.N} R={self.R} live={self.live} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.M, self.K).to(dtype)
        static = static_rank(self.keep, self.K, self.N)

        def scores(B: Tensor) -> Tensor:
            return (x.float() @ B.float().T).abs()

        def adapter() -> tuple[Tensor, Tensor, Tensor]:
            B, rows = weight(self.R, self.K, dtype), weight(self.R, self.N, dtype)
            return B, rows, threshold_keeping(self.live, scores(B))

        def masked_in_torch(B: Tensor, A: Tensor, threshold: Tensor) -> Tensor:
            return F.linear(masked(F.linear(x, B), threshold), A)

        def masked_weights() -> tuple[Tensor, Tensor, Tensor]:
            B = weight(self.R, self.K, dtype)
            return B, weight(self.N, self.R, dtype), threshold_keeping(self.live, scores(B))

        def error() -> float:
            B, rows, threshold = ours[0]
            exact = reference.masked_lowrank_linear(x.double(), B.double(), rows.double(), threshold.double())
            return difference(ops.masked_lowrank_linear(x, B, rows, threshold), exact)

        dense = copies(lambda: (x, weight(self.N, self.K, dtype)))
        ours = copies(adapter, dtype.itemsize * (self.R * self.K + self.live * self.N))
        calls = {
            "dense": turns(F.linear, dense),
            "dense compiled": turns(compiled(F.linear), far(dense)),
            "static low rank": turns(
                low_rank,
                copies(lambda: (x, weight(static, self.K, dtype), weight(self.N, static, dtype))),
            ),
            **packed_pair(x, self.N, static),
            "masked in torch": turns(masked_in_torch, copies(masked_weights)),
            "rana": turns(lambda B, rows, t: ops.masked_lowrank_linear(x, B, rows, t), ours),
        }
        rows = wanted(scores(ours[0][0]), ours[0][2])
        touched = self.R * self.K + rows * self.N
        flops = 2 * self.M * (self.R * self.K + self.live * self.N)
        return Contenders(calls, dtype.itemsize * touched, flops, error)


@dataclass(frozen=True)
class Neurons:
    """A neuron adapter R -> N, `live` inputs kept, for M tokens."""

    R: int
    N: int
    live: int
    M: int
    dtype: str

    @property
    def keep(self) -> float:
        return self.live / self.R

    @property
    def name(self) -> str:
        return f"neurons {self.R}->{self.N} live={self.live} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        h, scale = torch.randn(self.M, self.R).to(dtype), torch.ones(self.R)
        scores = h.float().abs()
        threshold = threshold_keeping(self.live, scores)
        static = static_rank(self.keep, self.R, self.N)
        touched = dtype.itemsize * wanted(scores, threshold) * self.N
        ours = copies(lambda: (weight(self.R, self.N, dtype),), touched)
        dense = copies(lambda: (h, weight(self.N, self.R, dtype)))

        def error() -> float:
            rows = ours[0][0]
            exact = reference.masked_linear(h.double(), rows.double(), threshold.double(), scale.double())
            return difference(ops.masked_linear(h, rows, threshold, scale), exact)

        calls = {
            "dense": turns(F.linear, dense),
            "dense compiled": turns(compiled(F.linear), far(dense)),
            "static low rank": turns(
                low_rank,
                copies(lambda: (h, weight(static, self.R, dtype), weight(self.N, static, dtype))),
            ),
            **packed_pair(h, self.N, static),
            "masked in torch": turns(
                lambda h, W: F.linear(masked(h, threshold), W),
                copies(lambda: (h, weight(self.N, self.R, dtype))),
            ),
            "rana": turns(lambda rows: ops.masked_linear(h, rows, threshold, scale), ours),
        }
        return Contenders(calls, touched, 2 * self.M * self.live * self.N, error)


def packed_pair(x: Tensor, N: int, rank: int) -> dict[str, Callable[[], Tensor]]:
    """A dense layer x [M, K] -> N and one of so many ranks, both packed; none where torch cannot do that."""
    if not can_pack(x.dtype):
        return {}
    M, K = x.shape

    def pack(*shape: int) -> Tensor:
        return packed(weight(*shape, x.dtype), M)

    return {
        "dense packed": turns(packed_linear, copies(lambda: (x, pack(N, K)))),
        "static packed": turns(packed_low_rank, copies(lambda: (x, pack(rank, K), pack(N, rank)))),
    }
