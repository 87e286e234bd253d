"""The benchmarked calls: each case builds its weights and yields the contenders that do the same job.

Weights are random, every copy of them is larger than the last-level cache or there are enough copies,
and thresholds are placed so that exactly `live` rows are kept: scattered ones, the worst order for a
prefetcher (ranks of a real model are sorted by energy, so that the kept ones lie together).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_kernels import ops

ROTATED_BYTES = 160 * 2**20  # several times the last-level cache
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Contenders:
    """Calls that take turns over copies of their weights; `bytes` of weights that ours has to read."""

    calls: dict[str, Callable[[], Tensor]]
    bytes: float


def rotated(
    call: Callable[..., Tensor], make: Callable[[], tuple], read: float | None = None
) -> Callable[[], Tensor]:
    """`call` on the weights that `make` gives, a fresh copy each time, until they have left the cache.

    `read`: bytes of a copy that a call reads, if not all of it.
    """
    first = make()
    size = sum(t.nbytes for t in first if isinstance(t, Tensor)) if read is None else int(read)
    copies = [first, *(make() for _ in range(math.ceil(ROTATED_BYTES / max(size, 1))))]
    turns: Iterator[tuple] = itertools.cycle(copies)
    return lambda: call(*next(turns))


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] random, scaled so that products stay of the size of their input."""
    return torch.empty(rows, columns, dtype=dtype).normal_(std=columns**-0.5)


def threshold_keeping(live: int, scores: Tensor) -> Tensor:
    """The threshold, [] float32, that `live` of the scores [M, R] reach in the mean over tokens."""
    ordered = scores.flatten().sort(descending=True).values
    kept = min(live * scores.shape[0], len(ordered) - 1)
    return (ordered[kept - 1] + ordered[kept]) / 2 if kept else ordered[0] + 1


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
        static = round(self.keep * self.K * self.N / (self.K + self.N))

        def adapter() -> tuple[Tensor, Tensor, Tensor]:
            B, rows = weight(self.R, self.K, dtype), weight(self.R, self.N, dtype)
            return B, rows, threshold_keeping(self.live, (x.float() @ B.float().T).abs())

        def masked_in_torch(B: Tensor, A: Tensor, threshold: Tensor) -> Tensor:
            h = F.linear(x, B)
            return F.linear(torch.where(h.abs() < threshold, 0, h), A)

        def masked_weights() -> tuple[Tensor, Tensor, Tensor]:
            B, rows, threshold = adapter()
            return B, rows.T.contiguous(), threshold

        touched = dtype.itemsize * (self.R * self.K + self.live * self.N)
        calls = {
            "dense": rotated(lambda W: F.linear(x, W), lambda: (weight(self.N, self.K, dtype),)),
            "static low rank": rotated(
                lambda B, A: F.linear(F.linear(x, B), A),
                lambda: (weight(static, self.K, dtype), weight(self.N, static, dtype)),
            ),
            "masked in torch": rotated(masked_in_torch, masked_weights),
            "rana": rotated(lambda B, rows, t: ops.masked_lowrank_linear(x, B, rows, t), adapter, touched),
        }
        return Contenders(calls, touched)


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
        threshold = threshold_keeping(self.live, h.float().abs())
        touched = dtype.itemsize * self.live * self.N
        calls = {
            "dense": rotated(lambda W: F.linear(h, W), lambda: (weight(self.N, self.R, dtype),)),
            "rana": rotated(
                lambda rows: ops.masked_linear(h, rows, threshold, scale),
                lambda: (weight(self.R, self.N, dtype),),
                touched,
            ),
        }
        return Contenders(calls, touched)


@dataclass(frozen=True)
class Mlp:
    """A gated MLP with `ranks` stored for each of up and gate, `live` of them and `neurons` kept."""

    K: int
    I: int  # noqa: E741
    ranks: int
    live: int
    neurons: int
    M: int
    dtype: str

    @property
    def keep(self) -> float:
        cost = 2 * (self.ranks * self.K + self.live * self.I) + self.neurons * self.K
        return cost / (3 * self.K * self.I)

    @property
    def name(self) -> str:
        return f"mlp {self.K}x{self.I} R={self.ranks} live={self.live}/{self.neurons} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.M, self.K).to(dtype)

        def adapter() -> tuple[Tensor, ...]:
            B = weight(2 * self.ranks, self.K, dtype)
            h = (x.float() @ B.float().T).abs()
            threshold = threshold_keeping(2 * self.live, h).expand(2 * self.ranks).contiguous()
            up, gate = weight(self.ranks, self.I, dtype), weight(self.ranks, self.I, dtype)
            g = F.silu(half(B, gate, threshold, 1)) * half(B, up, threshold, 0)
            scale = torch.ones(self.I)
            down = weight(self.I, self.K, dtype)
            return B, up, gate, threshold, down, scale, threshold_keeping(self.neurons, g.float().abs())

        def half(B: Tensor, rows: Tensor, threshold: Tensor, index: int) -> Tensor:
            part = slice(index * self.ranks, (index + 1) * self.ranks)
            return ops.masked_lowrank_linear(x, B[part], rows, threshold[part])

        def fused(B, up, gate, threshold, down, scale, down_threshold) -> Tensor:
            return ops.masked_mlp(
                x, B, up, gate, threshold, None, None, down, scale, down_threshold, None, "silu"
            )  # fmt: skip

        def parts(B, up, gate, threshold, down, scale, down_threshold) -> Tensor:
            g = F.silu(half(B, gate, threshold, 1)) * half(B, up, threshold, 0)
            return ops.masked_linear(g, down, down_threshold, scale)

        def dense(up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        def dense_weights() -> tuple[Tensor, Tensor, Tensor]:
            up, gate = weight(self.I, self.K, dtype), weight(self.I, self.K, dtype)
            return up, gate, weight(self.K, self.I, dtype)

        calls = {
            "dense": rotated(dense, dense_weights),
            "parts": rotated(parts, adapter),
            "rana": rotated(fused, adapter),
        }
        touched = 2 * self.ranks * self.K + 2 * self.live * self.I + self.neurons * self.K
        return Contenders(calls, dtype.itemsize * touched)


Case = Lowrank | Neurons | Mlp

# keep 0.56 on the up and gate projections of Llama-2-7B, at three splits into stored and kept ranks
SPLITS = ((2048, 1532), (2464, 1377), (3072, 1151))

DECODE: list[Case] = [
    *(Lowrank(4096, 11008, R, live, 1, dtype) for dtype in ("bf16", "fp32") for R, live in SPLITS),
    *(Lowrank(4096, 11008, 2464, 1377, M, dtype) for dtype in ("bf16", "fp32") for M in (2, 4, 8)),
    Lowrank(4096, 11008, 2464, 1377, 1, "fp16"),
    *(Neurons(11008, 4096, live, 1, dtype) for dtype in ("bf16", "fp32") for live in (11008, 5504, 2752)),
    Mlp(4096, 11008, 2464, 1377, 6164, 1, "bf16"),
    Mlp(2048, 8192, 1152, 842, 4587, 1, "bf16"),
]
# the same layer at other densities, for the plot
DENSITY: list[Case] = [Lowrank(4096, 11008, 2464, live, 1, "bf16") for live in (123, 616, 1232, 1848, 2464)]
PREFILL: list[Case] = [
    Lowrank(4096, 11008, 2464, 1377, M, dtype) for dtype in ("bf16", "fp32") for M in (16, 64, 256)
]
