"""The ops in plain PyTorch: the specification, the oracle of every test, and the fallback.

Each function converts its inputs to float32 once, computes in that precision, and rounds the result once.
Quantised weights are dequantised, which is exact in float32.
float64 inputs stay in float64, so that tests can compare gradients with finite differences.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_kernels.ops import checks
from rana_kernels.ops.checks import widen
from rana_kernels.ops.mlp import combine, gate_ranks
from rana_kernels.ops.quantized import dequantize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
}


def keep(h: Tensor, threshold: Tensor, norms: Tensor | None = None) -> Tensor:
    """Return the mask, [..., R] bool: False where `|h|·norms < threshold`. NaN is therefore kept."""
    score = h.abs() if norms is None else h.abs() * norms
    return ~(score < threshold)


def activate(h: Tensor, activation: str) -> Tensor:
    """Apply the pointwise nonlinearity of an MLP. `activation` is a name that `masked_mlp` accepts."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(checks.ACTIVATIONS)}")
    return _ACTIVATIONS[activation](h)


def masked_linear(
    h: Tensor,
    rows: Tensor,
    threshold: Tensor,
    norms: Tensor | None = None,
    bias: Tensor | None = None,
    rows_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_linear(h, rows, threshold, norms, bias, rows_scale)
    wide_h = widen(h)
    z = torch.where(keep(wide_h, threshold, norms), wide_h, 0)
    y = z @ dequantize(rows, rows_scale, dtype=wide_h.dtype)
    return (y if bias is None else y + widen(bias)).to(h.dtype)


def masked_lowrank_linear(
    x: Tensor,
    B: Tensor,
    rows: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    B_scale: Tensor | None = None,
    rows_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_lowrank_linear(x, B, rows, threshold, bias, B_scale, rows_scale)
    wide_x = widen(x)
    h = wide_x @ dequantize(B, B_scale, x.shape[-1], wide_x.dtype).T
    wide_rows = dequantize(rows, rows_scale, dtype=wide_x.dtype)
    return masked_linear(h, wide_rows, threshold, None, _widen_optional(bias)).to(x.dtype)


def masked_mlp(
    x: Tensor,
    B: Tensor | None,
    up_rows: Tensor,
    gate_rows: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_rows: Tensor,
    down_norms: Tensor,
    down_threshold: Tensor,
    down_bias: Tensor | None,
    activation: str,
    B_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_mlp(
        x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias, down_rows, down_norms, down_threshold,
        down_bias, activation, B_scale, up_scale, gate_scale, down_scale,
    )  # fmt: skip
    wide_x = widen(x)
    h = wide_x if B is None else wide_x @ dequantize(B, B_scale, x.shape[-1], wide_x.dtype).T

    def expand(ranks: slice, rows: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        own = threshold[ranks] if threshold.dim() else threshold
        wide_rows = dequantize(rows, scale, dtype=wide_x.dtype)
        return masked_linear(h[..., ranks], wide_rows, own, norms, _widen_optional(bias))

    up, gate = expand(slice(up_rows.shape[0]), up_rows, up_scale, up_bias), None
    if gate_rows is not None:
        last = gate_ranks(h.shape[-1], gate_rows.shape[0])
        gate = expand(last, gate_rows, gate_scale, gate_bias)
    g = combine(up, gate, partial(activate, activation=activation))
    wide_down = dequantize(down_rows, down_scale, dtype=wide_x.dtype)
    return masked_linear(g, wide_down, down_threshold, down_norms, _widen_optional(down_bias)).to(x.dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    checks.linear(x, weight, bias, weight_scale)
    wide_x = widen(x)
    y = wide_x @ dequantize(weight, weight_scale, x.shape[-1], wide_x.dtype).T
    return (y if bias is None else y + widen(bias)).to(x.dtype)


def _widen_optional(t: Tensor | None) -> Tensor | None:
    return None if t is None else widen(t)
