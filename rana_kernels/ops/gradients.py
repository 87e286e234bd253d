"""Gradients of the ops. The mask counts as a constant, so thresholds and norms get no gradient.

Each backward recomputes what it needs from the saved inputs, in the precision in which forward accumulates,
and rounds each gradient once. It consists of plain torch ops, so it runs on any device with any backend.
"""

import torch
from torch import Tensor

from rana_kernels.ops.checks import ACTIVATIONS, widen
from rana_kernels.ops.mlp import gate_ranks
from rana_kernels.ops.reference import activate, keep


def _flat(t: Tensor) -> Tensor:
    """Reshape [..., C] to [M, C] and convert to the wide dtype."""
    return widen(t.reshape(-1, t.shape[-1]))


def _product(grad: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z, rows and bias in `y = z @ rows + bias`. `grad` is the gradient of y."""
    return grad @ rows.T, z.T @ grad, grad.sum(0)


def _affine(z: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    y = z @ rows
    return y if bias is None else y + bias.to(y.dtype)


def _activation_gradient(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    match activation:
        case "silu":
            return aten.silu_backward(grad, h)
        case "gelu":
            return aten.gelu_backward(grad, h)
        case "gelu_tanh":
            return aten.gelu_backward(grad, h, approximate="tanh")
        case "relu":
            return grad * (h > 0)
        case "relu2":
            return grad * 2 * h.relu()
    raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")


def _like(gradients: list[Tensor | None], inputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Give each gradient the shape and dtype of its input. Return None where either of the two is None."""
    return tuple(
        None if g is None or t is None else g.reshape(t.shape).to(t.dtype)
        for g, t in zip(gradients, inputs, strict=True)
    )


def save(ctx, inputs, output) -> None:
    """Save the inputs of an op for backward, and nothing that forward computed (`setup_context`)."""
    tensors = [t if isinstance(t, Tensor) else None for t in inputs]
    ctx.activation = inputs[-1] if isinstance(inputs[-1], str) else None
    ctx.save_for_backward(*tensors[: len(inputs) - (ctx.activation is not None)])


def masked_linear(ctx, grad: Tensor):
    h, rows, threshold, norms, bias = ctx.saved_tensors
    wide_h = _flat(h)
    mask = keep(wide_h, threshold, norms)
    grad_z, grad_rows, grad_bias = _product(_flat(grad), wide_h * mask, _flat(rows))
    return _like([grad_z * mask, grad_rows, None, None, grad_bias], [h, rows, None, None, bias])


def masked_lowrank_linear(ctx, grad: Tensor):
    x, B, rows, threshold, bias = ctx.saved_tensors
    wide_x, wide_B = _flat(x), _flat(B)
    h = wide_x @ wide_B.T
    mask = keep(h, threshold)
    grad_z, grad_rows, grad_bias = _product(_flat(grad), h * mask, _flat(rows))
    grad_h = grad_z * mask
    return _like([grad_h @ wide_B, grad_h.T @ wide_x, grad_rows, None, grad_bias], [x, B, rows, None, bias])


def masked_mlp(ctx, grad: Tensor):
    (
        x, B, up_rows, gate_rows, threshold, up_bias, gate_bias,
        down_rows, down_norms, down_threshold, down_bias,
    ) = ctx.saved_tensors  # fmt: skip
    wide_x, wide_B, up, down = _flat(x), _flat(B), _flat(up_rows), _flat(down_rows)
    gate = up[:0] if gate_rows is None else _flat(gate_rows)
    last = gate_ranks(B.shape[0], gate.shape[0])
    h = wide_x @ wide_B.T
    mask = keep(h, threshold)
    z_up, z_gate = (h * mask)[:, : up.shape[0]], (h * mask)[:, last]

    pre_up = _affine(z_up, up, up_bias)
    pre_gate = pre_up if gate_rows is None else _affine(z_gate, gate, gate_bias)
    acted = activate(pre_gate, ctx.activation)
    g = acted if gate_rows is None else acted * pre_up
    mask_g = keep(g, down_threshold, down_norms)

    grad_g, grad_down, grad_down_bias = _product(_flat(grad), g * mask_g, down)
    grad_g = grad_g * mask_g
    grad_gate = grad_gate_bias = None
    grad_h = torch.zeros_like(h)
    if gate_rows is None:
        grad_pre_up = _activation_gradient(grad_g, pre_up, ctx.activation)
    else:
        grad_pre_up = grad_g * acted
        grad_pre_gate = _activation_gradient(grad_g * pre_up, pre_gate, ctx.activation)
        grad_z_gate, grad_gate, grad_gate_bias = _product(grad_pre_gate, z_gate, gate)
        grad_h[:, last] += grad_z_gate
    grad_z_up, grad_up, grad_up_bias = _product(grad_pre_up, z_up, up)
    grad_h[:, : up.shape[0]] += grad_z_up
    grad_h = grad_h * mask
    return *_like(
        [grad_h @ wide_B, grad_h.T @ wide_x, grad_up, grad_gate, None, grad_up_bias, grad_gate_bias,
         grad_down, None, None, grad_down_bias],
        [x, B, up_rows, gate_rows, None, up_bias, gate_bias, down_rows, None, None, down_bias],
    ), None  # fmt: skip


def linear(ctx, grad: Tensor):
    # The weight of an lm_head is large and often frozen, so it is not copied to float32: torch's products
    # accumulate in float32 anyway.
    x, weight, bias = ctx.saved_tensors
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = flat @ weight if ctx.needs_input_grad[0] else None
    grad_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return _like([grad_x, grad_weight, flat.sum(0)], [x, weight, bias])
