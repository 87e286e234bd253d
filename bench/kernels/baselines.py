"""The layers that ours is compared with: dense and static low rank, eager, compiled and packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.weights import copies, far, turns, weight

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
Product = Callable[..., Tensor]
Call = Callable[[], Tensor]


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


@dataclass(frozen=True)
class Forms:
    """One layer in four forms f(x, *weights). Static forms take two factors, B and A, for each weight."""

    dense: Product
    static: Product
    dense_packed: Product
    static_packed: Product


def baselines(
    x: Tensor, shapes: Sequence[tuple[int, int]], cost_ratio: float, forms: Forms
) -> dict[str, Call]:
    """Return the baselines of a layer with weights of `shapes` [N, K]; packed ones where torch can pack.

    `cost_ratio` is the cost of the static low-rank forms.
    """

    def dense() -> list[Tensor]:
        return [weight(*shape, x.dtype) for shape in shapes]

    def factors() -> list[Tensor]:
        sizes = [(static_rank(cost_ratio, K, N), N, K) for N, K in shapes]
        return [w for R, N, K in sizes for w in (weight(R, K, x.dtype), weight(N, R, x.dtype))]

    pack = partial(packed, M=len(x))
    weights = copies(lambda: (x, *dense()))
    calls = {
        "dense": turns(forms.dense, weights),
        "dense compiled": turns(compiled(forms.dense), far(weights)),
        "static low rank": turns(forms.static, copies(lambda: (x, *factors()))),
    }
    if can_pack(x.dtype):
        calls["dense packed"] = turns(forms.dense_packed, copies(lambda: (x, *map(pack, dense()))))
        calls["static packed"] = turns(forms.static_packed, copies(lambda: (x, *map(pack, factors()))))
    return calls


def static_rank(cost_ratio: float, K: int, N: int) -> int:
    """Return the rank at which a plain low-rank linear K -> N costs `cost_ratio` of the dense one."""
    return max(1, round(cost_ratio * K * N / (K + N)))


def low_rank(x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return F.linear(F.linear(x, B), A)


def compiled(function: Product) -> Product:
    """Compile `function` for one shape.

    torch falls back to eager calls, silently, once too many shapes are compiled. So drop earlier ones first.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def can_pack(dtype: torch.dtype) -> bool:
    """Say whether torch's oneDNN multiplies weights in its own layout here. Processors differ in 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or supported[dtype]()


def packed(weight: Tensor, M: int) -> Tensor:
    """Return a weight [N, K] in oneDNN's layout for M tokens.

    torch.compile does this to a model's weights when its option `freezing` is on, and calls `packed_linear`.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, M)


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def packed_low_rank(x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return packed_linear(packed_linear(x, B), A)


LINEAR = Forms(F.linear, low_rank, packed_linear, packed_low_rank)


def masked(h: Tensor, threshold: Tensor) -> Tensor:
    """Zero the values of h whose size is below the threshold, in torch's own operations."""
    return torch.where(h.abs() < threshold, 0, h)


def difference(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())
