"""The ops in plain PyTorch: the specification, the oracle of every test, and the fallback.

Each function converts its inputs to float32 once, computes in that precision, and rounds the result once.
float64 inputs stay in float64, so that tests can compare gradients with finite differences.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_kernels.ops import checks
from rana_kernels.ops.checks import widen
from rana_kernels.ops.mlp import combine, gate_ranks


def keep(h: Tensor, threshold: Tensor, norms: Tensor | None = None) -> Tensor:
    """Return the mask, [..., R] bool: False where `|h|·norms < threshold`. NaN is therefore kept."""
    score = h.abs() if norms is None else h.abs() * norms
    return ~(score < threshold)


def activate(h: Tensor, activation: str) -> Tensor:
    """Apply the pointwise nonlinearity of an MLP. `activation` is a name that `masked_mlp` accepts."""
    match activation:
        case "silu":
            return F.silu(h)
        case "gelu":
            return F.gelu(h)
        case "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        case "relu":
            return F.relu(h)
        case "relu2":
            return F.relu(h).square()
    raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(checks.ACTIVATIONS)}")


def masked_linear(
    h: Tensor, rows: Tensor, threshold: Tensor, norms: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    checks.masked_linear(h, rows, threshold, norms, bias)
    wide_h = widen(h)
    z = torch.where(keep(wide_h, threshold, norms), wide_h, 0)
    y = z @ widen(rows)
    return (y if bias is None else y + widen(bias)).to(h.dtype)


def masked_lowrank_linear(
    x: Tensor, B: Tensor, rows: Tensor, threshold: Tensor, bias: Tensor | None = None
) -> Tensor:
    checks.masked_lowrank_linear(x, B, rows, threshold, bias)
    h = widen(x) @ widen(B).T
    return masked_linear(h, widen(rows), threshold, None, _widen_optional(bias)).to(x.dtype)


def masked_mlp(
    x: Tensor,
    B: Tensor,
    up_rows: Tensor,
    gate_rows: Tensor | None,
    threshold: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_rows: Tensor,
    down_norms: Tensor,
    down_threshold: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    checks.masked_mlp(
        x, B, up_rows, gate_rows, threshold, up_bias, gate_bias,
        down_rows, down_norms, down_threshold, down_bias, activation,
    )  # fmt: skip
    wide_x, wide_B, ranks = widen(x), widen(B), up_rows.shape[0]
    bias_up, bias_gate, bias_down = (_widen_optional(bias) for bias in (up_bias, gate_bias, down_bias))
    up = masked_lowrank_linear(wide_x, wide_B[:ranks], widen(up_rows), threshold[:ranks], bias_up)
    gate = None
    if gate_rows is not None:
        last = gate_ranks(B.shape[0], gate_rows.shape[0])
        gate = masked_lowrank_linear(wide_x, wide_B[last], widen(gate_rows), threshold[last], bias_gate)
    g = combine(up, gate, partial(activate, activation=activation))
    return masked_linear(g, widen(down_rows), down_threshold, down_norms, bias_down).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    checks.linear(x, weight, bias)
    y = widen(x) @ widen(weight).T
    return (y if bias is None else y + widen(bias)).to(x.dtype)


def _widen_optional(t: Tensor | None) -> Tensor | None:
    return None if t is None else widen(t)
