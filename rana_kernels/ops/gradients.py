"""Gradients of the ops. The mask counts as a constant, so thresholds and norms have none.

Backward recomputes what it needs from the saved inputs, in the precision the forward accumulates
in, and rounds each gradient once. It is made of plain torch ops: any device, any backend.
"""

import torch
from torch import Tensor

from rana_kernels.ops.checks import wide_dtype
from rana_kernels.ops.mlp import gate_ranks
from rana_kernels.ops.reference import activate, keep


def _flat(t: Tensor) -> Tensor:
    """[..., C] as [M, C], in the wide dtype."""
    return t.reshape(-1, t.shape[-1]).to(wide_dtype(t.dtype))


def _product(grad: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `y = z @ rows + bias`, from that of y: those of z, rows and bias."""
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
        case _:
            return grad * 2 * h.relu()


def _like(gradients: list[Tensor | None], inputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Each gradient in its input's shape and dtype; None where there is no gradient or no input."""
    return tuple(
        None if g is None or t is None else g.reshape(t.shape).to(t.dtype)
        for g, t in zip(gradients, inputs, strict=True)
    )


def save(ctx, inputs, output) -> None:
    """`setup_context` of every op: keep the inputs, nothing that forward computed."""
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
    # the weight of an lm_head is large and often frozen: no copy of it, and torch accumulates wide as it is
    x, weight, bias = ctx.saved_tensors
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = flat @ weight if ctx.needs_input_grad[0] else None
    grad_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return _like([grad_x, grad_weight, flat.sum(0)], [x, weight, bias])
