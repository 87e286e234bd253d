"""The benchmarked MLP: one op, against the same in parts and against what does the same job."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

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


class Weights(NamedTuple):
    """Of `masked_mlp`, in the order of its arguments."""

    B: Tensor
    up: Tensor
    gate: Tensor
    threshold: Tensor
    down: Tensor
    norms: Tensor
    down_threshold: Tensor


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
        return self._cost(2 * self.live, self.neurons) / (3 * self.K * self.I)

    @property
    def name(self) -> str:
        return f"mlp {self.K}x{self.I} R={self.ranks} live={self.live}/{self.neurons} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.M, self.K).to(dtype)
        dense_weights = copies(lambda: tuple(weight(*shape, dtype) for shape in self._shapes()))
        static_weights = copies(lambda: tuple(t for shape in self._shapes() for t in self._pair(*shape)))
        ours = copies(lambda: self._adapter(x))
        calls = {
            "dense": turns(lambda *w: dense(x, *w), dense_weights),
            "dense compiled": turns(compiled(lambda *w: dense(x, *w)), far(dense_weights)),
            "static low rank": turns(lambda *w: static(x, *w), static_weights),
            **self._packed(x),
            "masked in torch": turns(
                lambda *w: masked_in_torch(x, *w), copies(lambda: transposed(self._adapter(x)))
            ),
            "parts": turns(lambda *w: parts(x, Weights(*w)), far(ours)),
            "rana": turns(lambda *w: fused(x, Weights(*w)), ours),
        }
        first = ours[0]
        values = x.float() @ first.B.float().T
        rows = wanted(values.abs(), first.threshold)
        neurons = wanted(expand(x, first).float().abs(), first.down_threshold)
        return Contenders(
            calls,
            dtype.itemsize * self._cost(rows, neurons),
            2 * self.M * self._cost(2 * self.live, self.neurons),
            lambda: difference(fused(x, first), exact(x, first)),
        )

    def _cost(self, rows: int, neurons: int) -> int:
        """Multiply-adds of a token that keeps so many ranks, of up and gate together, and neurons."""
        return 2 * self.ranks * self.K + rows * self.I + neurons * self.K

    def _shapes(self) -> list[tuple[int, int]]:
        return [(self.I, self.K), (self.I, self.K), (self.K, self.I)]

    def _pair(self, N: int, K: int) -> tuple[Tensor, Tensor]:
        R = static_rank(self.keep, K, N)
        return weight(R, K, DTYPES[self.dtype]), weight(N, R, DTYPES[self.dtype])

    def _packed(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Dense and static with packed weights; none where torch cannot do that."""
        if not can_pack(x.dtype):
            return {}

        def pack(weights: Iterable[Tensor]) -> tuple[Tensor, ...]:
            return tuple(packed(w, self.M) for w in weights)

        wide = copies(lambda: pack(weight(*shape, x.dtype) for shape in self._shapes()))
        thin = copies(lambda: pack(w for shape in self._shapes() for w in self._pair(*shape)))
        return {
            "dense packed": turns(lambda *w: dense(x, *w, linear=packed_linear), wide),
            "static packed": turns(lambda *w: static(x, *w, linear=packed_low_rank), thin),
        }

    def _adapter(self, x: Tensor) -> Weights:
        B = weight(2 * self.ranks, self.K, x.dtype)
        threshold = threshold_keeping(2 * self.live, (x.float() @ B.float().T).abs())
        up, gate = weight(self.ranks, self.I, x.dtype), weight(self.ranks, self.I, x.dtype)
        down, norms = weight(self.I, self.K, x.dtype), torch.ones(self.I)
        made = Weights(B, up, gate, threshold.expand(len(B)).contiguous(), down, norms, threshold)
        kept = threshold_keeping(self.neurons, expand(x, made).float().abs())
        return made._replace(down_threshold=kept)


def dense(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, linear: Callable = F.linear) -> Tensor:
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def static(x: Tensor, *factors: Tensor, linear: Callable = low_rank) -> Tensor:
    """factors: two each of up, gate and down."""
    up, gate, down = factors[:2], factors[2:4], factors[4:]
    return linear(F.silu(linear(x, *gate)) * linear(x, *up), *down)


def transposed(w: Weights) -> Weights:
    """The factors as `F.linear` wants them."""
    return w._replace(**{name: getattr(w, name).T.contiguous() for name in ("up", "gate", "down")})


def masked_in_torch(
    x: Tensor, B: Tensor, up: Tensor, gate: Tensor, threshold: Tensor, down: Tensor, _: Tensor, last: Tensor
) -> Tensor:
    h_up, h_gate = masked(F.linear(x, B), threshold).chunk(2, dim=-1)
    return F.linear(masked(F.silu(F.linear(h_gate, gate)) * F.linear(h_up, up), last), down)


def expand(x: Tensor, w: Weights) -> Tensor:
    """What down reads."""
    R = len(w.up)
    up = ops.masked_lowrank_linear(x, w.B[:R], w.up, w.threshold[:R])
    return F.silu(ops.masked_lowrank_linear(x, w.B[R:], w.gate, w.threshold[R:])) * up


def parts(x: Tensor, w: Weights) -> Tensor:
    return ops.masked_linear(expand(x, w), w.down, w.down_threshold, w.norms)


def fused(x: Tensor, w: Weights) -> Tensor:
    return ops.masked_mlp(x, *w[:4], None, None, *w[4:], None, "silu")


def exact(x: Tensor, w: Weights) -> Tensor:
    wide = [t.double() for t in w]
    return reference.masked_mlp(x.double(), *wide[:4], None, None, *wide[4:], None, "silu")
