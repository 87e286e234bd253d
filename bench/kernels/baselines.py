"""The layers that ours is compared with: dense and static low rank, eager, compiled and packed."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.weights import Call, copies, far, turns, weight

Layer = Callable[..., Tensor]


def one_linear(x: Tensor, *weights: Tensor, linear: Layer = F.linear) -> Tensor:
    """Compute one linear. `linear` takes one weight, or the two factors of a static low-rank one."""
    return linear(x, *weights)


def gated_mlp(x: Tensor, *weights: Tensor, linear: Layer = F.linear) -> Tensor:
    """Compute a gated MLP from the weights, or from the factors, of up, gate and down."""
    each = len(weights) // 3
    up, gate, down = weights[:each], weights[each : 2 * each], weights[2 * each :]
    return linear(F.silu(linear(x, *gate)) * linear(x, *up), *down)


def baselines(
    x: Tensor, shapes: Sequence[tuple[int, int]], cost_ratio: float, layer: Layer
) -> dict[str, Call]:
    """Return the baselines of a layer with weights of `shapes` [N, K]; packed ones where torch can pack.

    `cost_ratio` is the cost of the static low-rank forms.
    """

    def dense() -> list[Tensor]:
        return [weight(*shape, like=x) for shape in shapes]

    def factors() -> list[Tensor]:
        sizes = [(static_rank(cost_ratio, K, N), N, K) for N, K in shapes]
        return [w for R, N, K in sizes for w in (weight(R, K, like=x), weight(N, R, like=x))]

    pack = partial(packed, M=len(x))
    weights = copies(lambda: (x, *dense()))
    calls = {
        "dense": turns(layer, weights),
        "dense compiled": turns(compiled(layer), far(weights)),
        "static low rank": turns(partial(layer, linear=low_rank), copies(lambda: (x, *factors()))),
    }
    if can_pack(x.dtype):
        for name, linear, make in (
            ("dense packed", packed_linear, dense), ("static packed", packed_low_rank, factors),
        ):  # fmt: skip
            turned = copies(lambda make=make: (x, *map(pack, make())))
            calls[name] = turns(partial(layer, linear=linear), turned)
    return calls


def static_rank(cost_ratio: float, K: int, N: int) -> int:
    """Return the rank at which a plain low-rank linear K -> N costs `cost_ratio` of the dense one."""
    return max(1, round(cost_ratio * K * N / (K + N)))


def low_rank(x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return F.linear(F.linear(x, B), A)


def compiled(function: Layer) -> Layer:
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
