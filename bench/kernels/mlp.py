"""The benchmarked MLP: one op, against the same in separate ops and against its baselines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.baselines import (
    DTYPES,
    Contenders,
    Forms,
    baselines,
    difference,
    low_rank,
    masked,
    packed_linear,
    packed_low_rank,
)
from bench.kernels.weights import copies, far, rows_read, threshold_for_live, turns, weight
from rana_kernels import ops
from rana_kernels.ops import reference


class Weights(NamedTuple):
    """The tensors of `masked_mlp`, in the order of its arguments."""

    B: Tensor
    up: Tensor
    gate: Tensor
    threshold: Tensor
    down: Tensor
    norms: Tensor
    down_threshold: Tensor


@dataclass(frozen=True)
class Mlp:
    """A gated MLP that stores `ranks` for each of up and gate, and keeps `live` of them and `neurons`."""

    K: int
    I: int  # noqa: E741
    ranks: int
    live: int
    neurons: int
    M: int
    dtype: str

    @property
    def cost_ratio(self) -> float:
        return self._cost(2 * self.live, self.neurons) / (3 * self.K * self.I)

    @property
    def name(self) -> str:
        return f"mlp {self.K}x{self.I} R={self.ranks} live={self.live}/{self.neurons} M={self.M} {self.dtype}"

    def contenders(self) -> Contenders:
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.M, self.K).to(dtype)
        shapes = [(self.I, self.K), (self.I, self.K), (self.K, self.I)]
        ours = copies(lambda: self._adapter(x))
        calls = {
            **baselines(x, shapes, self.cost_ratio, MLP),
            "masked in torch": turns(
                lambda *w: masked_in_torch(x, Weights(*w)), copies(lambda: transposed(self._adapter(x)))
            ),
            "parts": turns(lambda *w: parts(x, Weights(*w)), far(ours)),
            "rana": turns(lambda *w: fused(x, Weights(*w)), ours),
        }
        first = ours[0]
        rows = rows_read((x.float() @ first.B.float().T).abs(), first.threshold)
        neurons = rows_read(expand(x, first).float().abs(), first.down_threshold)
        return Contenders(
            calls,
            dtype.itemsize * self._cost(rows, neurons),
            2 * self.M * self._cost(2 * self.live, self.neurons),
            lambda: difference(fused(x, first), exact(x, first)),
        )

    def _cost(self, rows: int, neurons: int) -> int:
        """Return the multiply-adds of a token that keeps `rows` of both up and gate, and `neurons`."""
        return 2 * self.ranks * self.K + rows * self.I + neurons * self.K

    def _adapter(self, x: Tensor) -> Weights:
        B = weight(2 * self.ranks, self.K, x.dtype)
        threshold = threshold_for_live(2 * self.live, (x.float() @ B.float().T).abs())
        up, gate = (weight(self.ranks, self.I, x.dtype) for _ in range(2))
        down, norms = weight(self.I, self.K, x.dtype), torch.ones(self.I)
        made = Weights(B, up, gate, threshold.expand(len(B)).contiguous(), down, norms, threshold)
        scores = expand(x, made).float().abs()
        return made._replace(down_threshold=threshold_for_live(self.neurons, scores))


def dense(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, linear: Callable = F.linear) -> Tensor:
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def static(x: Tensor, *factors: Tensor, linear: Callable = low_rank) -> Tensor:
    up, gate, down = factors[:2], factors[2:4], factors[4:]
    return linear(F.silu(linear(x, *gate)) * linear(x, *up), *down)


MLP = Forms(dense, static, partial(dense, linear=packed_linear), partial(static, linear=packed_low_rank))


def transposed(w: Weights) -> Weights:
    """Return the factors in the layout that `F.linear` takes."""
    return w._replace(**{name: getattr(w, name).T.contiguous() for name in ("up", "gate", "down")})


def masked_in_torch(x: Tensor, w: Weights) -> Tensor:
    h_up, h_gate = masked(F.linear(x, w.B), w.threshold).chunk(2, dim=-1)
    g = F.silu(F.linear(h_gate, w.gate)) * F.linear(h_up, w.up)
    return F.linear(masked(g, w.down_threshold), w.down)


def expand(x: Tensor, w: Weights) -> Tensor:
    """Return the input of down, by our ops."""
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
