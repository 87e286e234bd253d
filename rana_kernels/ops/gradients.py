"""Gradients of the ops. The mask counts as a constant, so thresholds and norms get no gradient.

Each backward recomputes what it needs from the saved inputs, in the precision in which forward accumulates,
and rounds each gradient once. It consists of plain torch ops, so it runs on any device with any backend.
Quantised weights and their scales get no gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rana_kernels.ops.checks import ACTIVATIONS, wide_dtype, widen
from rana_kernels.ops.mlp import gate_ranks
from rana_kernels.ops.quantized import dequantize, is_quantized
from rana_kernels.ops.reference import activate, keep


def _flat(t: Tensor) -> Tensor:
    """Reshape [..., C] to [M, C] and convert to the wide dtype."""
    return widen(t.reshape(-1, t.shape[-1]))


def _weights(weight: Tensor, scale: Tensor | None, columns: int | None = None) -> Tensor:
    """Return a weight in the wide dtype."""
    return dequantize(weight, scale, columns, wide_dtype(weight.dtype))


def _product(grad: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z, rows and bias in `y = z @ rows + bias`. `grad` is the gradient of y."""
    return grad @ rows.T, z.T @ grad, grad.sum(0)


def _affine(z: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    y = z @ rows
    return y if bias is None else y + bias.to(y.dtype)


_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, h: grad * (h > 0),
    "relu2": lambda grad, h: grad * 2 * h.relu(),
}


def _activation_gradient(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    if activation not in _ACTIVATION_GRADIENTS:
        raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    return _ACTIVATION_GRADIENTS[activation](grad, h)


def _like(gradients: list[Tensor | None], inputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Give each gradient the shape and dtype of its input. Absent and quantised inputs get None."""

    def like(gradient: Tensor | None, t: Tensor | None) -> Tensor | None:
        if gradient is None or t is None or is_quantized(t):
            return None
        return gradient.reshape(t.shape).to(t.dtype)

    return tuple(map(like, gradients, inputs))


def save(ctx, inputs, output) -> None:
    """Save the inputs of an op for backward, and nothing that forward computed (`setup_context`)."""
    ctx.activation = next((i for i in inputs if isinstance(i, str)), None)
    ctx.save_for_backward(*[i for i in inputs if not isinstance(i, str)])


def masked_linear(ctx, grad: Tensor):
    h, rows, threshold, norms, bias, rows_scale = ctx.saved_tensors
    wide_h = _flat(h)
    mask = keep(wide_h, threshold, norms)
    grad_z, grad_rows, grad_bias = _product(_flat(grad), wide_h * mask, _weights(rows, rows_scale))
    return *_like([grad_z * mask, grad_rows, None, None, grad_bias], [h, rows, None, None, bias]), None


def masked_lowrank_linear(ctx, grad: Tensor):
    x, B, rows, threshold, bias, B_scale, rows_scale = ctx.saved_tensors
    wide_x, wide_B = _flat(x), _weights(B, B_scale, x.shape[-1])
    h = wide_x @ wide_B.T
    mask = keep(h, threshold)
    grad_z, grad_rows, grad_bias = _product(_flat(grad), h * mask, _weights(rows, rows_scale))
    grad_h = grad_z * mask
    return *_like(
        [grad_h @ wide_B, grad_h.T @ wide_x, grad_rows, None, grad_bias], [x, B, rows, None, bias]
    ), None, None  # fmt: skip


def masked_mlp(ctx, grad: Tensor):
    (
        x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias,
        down_rows, down_norms, down_threshold, down_bias,
        B_scale, up_scale, gate_scale, down_scale,
    ) = ctx.saved_tensors  # fmt: skip
    wide_x, up, down = _flat(x), _weights(up_rows, up_scale), _weights(down_rows, down_scale)
    wide_B = None if B is None else _weights(B, B_scale, x.shape[-1])
    gate = None if gate_rows is None else _weights(gate_rows, gate_scale)
    h = wide_x if wide_B is None else wide_x @ wide_B.T
    mask = keep(h, threshold, norms)
    first = slice(up.shape[0])
    z_up = (h * mask)[:, first]

    pre_up = pre_gate = _affine(z_up, up, up_bias)
    if gate is not None:
        last = gate_ranks(h.shape[1], gate.shape[0])
        z_gate = (h * mask)[:, last]
        pre_gate = _affine(z_gate, gate, gate_bias)
    acted = activate(pre_gate, ctx.activation)
    g = acted if gate is None else acted * pre_up
    mask_g = keep(g, down_threshold, down_norms)

    grad_g, grad_down, grad_down_bias = _product(_flat(grad), g * mask_g, down)
    grad_g = grad_g * mask_g
    grad_gate = grad_gate_bias = None
    grad_h = torch.zeros_like(h)
    if gate is None:
        grad_pre_up = _activation_gradient(grad_g, pre_up, ctx.activation)
    else:
        grad_pre_up = grad_g * acted
        grad_pre_gate = _activation_gradient(grad_g * pre_up, pre_gate, ctx.activation)
        grad_z_gate, grad_gate, grad_gate_bias = _product(grad_pre_gate, z_gate, gate)
        grad_h[:, last] += grad_z_gate
    grad_z_up, grad_up, grad_up_bias = _product(grad_pre_up, z_up, up)
    grad_h[:, first] += grad_z_up
    grad_h = grad_h * mask
    grad_x, grad_B = (grad_h, None) if wide_B is None else (grad_h @ wide_B, grad_h.T @ wide_x)
    return *_like(
        [grad_x, grad_B, grad_up, grad_gate, None, None, grad_up_bias, grad_gate_bias,
         grad_down, None, None, grad_down_bias],
        [x, B, up_rows, gate_rows, None, None, up_bias, gate_bias, down_rows, None, None, down_bias],
    ), None, None, None, None, None  # fmt: skip


def linear(ctx, grad: Tensor):
    # The weight of an lm_head is large and often frozen, so it is not copied to float32: torch's products
    # accumulate in float32 anyway.
    x, weight, bias, weight_scale = ctx.saved_tensors
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = flat @ dequantize(weight, weight_scale, x.shape[-1], grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = flat.T @ x.reshape(-1, x.shape[-1])
    return *_like([grad_x, grad_weight, flat.sum(0)], [x, weight, bias]), None
