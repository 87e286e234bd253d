"""What the benchmarked cases share: the contenders they yield, and the baselines."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Contenders:
    """Calls that take turns over copies of their weights.

    bytes   of weights that ours has to read: B, and the rows that some token wants
    flops   that ours has to do: two a multiply-add, for the rows that each token keeps
    error   of ours, ‖y - exact‖ / ‖exact‖ against the reference in float64; computed when asked for
    """

    calls: dict[str, Callable[[], Tensor]]
    bytes: float
    flops: float
    error: Callable[[], float]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By torch.compile, for one shape. What earlier cases compiled is dropped: it counts towards a limit
    above which calls are no longer compiled, and nothing would say so."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN multiplies weights of its own layout here: in 16 bits processors differ."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or supported[dtype]()


def packed(weight: Tensor, M: int) -> Tensor:
    """A weight [N, K] as oneDNN likes to have it for M tokens: what torch.compile makes of the weights of a
    model where its option `freezing` is on, and calls `packed_linear` with."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, M)


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def packed_low_rank(x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return packed_linear(packed_linear(x, B), A)


def difference(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def low_rank(x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return F.linear(F.linear(x, B), A)


def masked(h: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(h.abs() < threshold, 0, h)


def static_rank(keep: float, K: int, N: int) -> int:
    """Of a plain low-rank linear that costs `keep`."""
    return max(1, round(keep * K * N / (K + N)))
