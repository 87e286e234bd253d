"""ONNX: each op of `torch.ops.rana` in standard ONNX operators, for `torch.onnx.export`.

The result is what the ops compute, with the mask decided on float32 values and NaN kept, in dense
matrix products: an ONNX runtime skips nothing, and a rank adapter costs `R·(K + N)` a token whatever its
mask drops. float16 and bfloat16 are cast to float32 and back. Needs the packages onnx and onnxscript.
"""

from collections.abc import Callable

import torch
from onnxscript import opset18 as op
from onnxscript.ir import DataType, Value
from torch._ops import OpOverload

from rana_kernels import ops
from rana_kernels.ops.mlp import gate_ranks


def translation_table() -> dict[OpOverload, Callable]:
    """What `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` needs to know of our ops."""
    return {getattr(torch.ops.rana, name).default: globals()[name] for name in ops.SCHEMAS}


def linear(x: Value, weight: Value, bias: Value | None = None) -> Value:
    return op.CastLike(_product(_wide(x), op.Transpose(weight, perm=[1, 0]), bias), x)


def masked_linear(
    h: Value, rows: Value, threshold: Value, norms: Value | None = None, bias: Value | None = None
) -> Value:
    return op.CastLike(_product(_masked(_wide(h), threshold, norms), rows, bias), h)


def masked_lowrank_linear(
    x: Value, B: Value, rows: Value, threshold: Value, bias: Value | None = None
) -> Value:
    return op.CastLike(_product(_masked(_ranks(x, B), threshold), rows, bias), x)


def masked_mlp(
    x: Value,
    B: Value,
    up_rows: Value,
    gate_rows: Value | None,
    threshold: Value,
    up_bias: Value | None,
    gate_bias: Value | None,
    down_rows: Value,
    down_norms: Value,
    down_threshold: Value,
    down_bias: Value | None,
    activation: str,
) -> Value:
    z = _masked(_ranks(x, B), threshold)
    up = _product(_part(z, slice(0, up_rows.shape[0])), up_rows, up_bias)
    if gate_rows is None:
        g = _activate(up, activation)
    else:
        gate_z = _part(z, gate_ranks(B.shape[0], gate_rows.shape[0]))
        g = op.Mul(_activate(_product(gate_z, gate_rows, gate_bias), activation), up)
    return op.CastLike(_product(_masked(g, down_threshold, down_norms), down_rows, down_bias), x)


def _wide(t: Value) -> Value:
    return op.Cast(t, to=DataType.FLOAT)


def _ranks(x: Value, B: Value) -> Value:
    return op.MatMul(_wide(x), op.Transpose(_wide(B), perm=[1, 0]))


def _masked(h: Value, threshold: Value, norms: Value | None = None) -> Value:
    """`h`, or 0 where `|h|·norms < threshold`: NaN is never less."""
    score = op.Abs(h) if norms is None else op.Mul(op.Abs(h), norms)
    return op.Where(op.Less(score, threshold), 0.0, h)


def _product(z: Value, rows: Value, bias: Value | None) -> Value:
    y = op.MatMul(z, _wide(rows))
    return y if bias is None else op.Add(y, _wide(bias))


def _part(z: Value, ranks: slice) -> Value:
    return op.Slice(z, [ranks.start], [ranks.stop], [-1])


def _relu(h: Value) -> Value:
    # runtimes disagree on what the operator Relu makes of NaN
    return op.Where(op.Less(h, 0.0), 0.0, h)


def _gelu(h: Value) -> Value:
    return op.Mul(op.Mul(0.5, h), op.Add(1.0, op.Erf(op.Mul(h, 2**-0.5))))


def _gelu_tanh(h: Value) -> Value:
    cubic = op.Add(h, op.Mul(0.044715, op.Mul(h, op.Mul(h, h))))
    return op.Mul(op.Mul(0.5, h), op.Add(1.0, op.Tanh(op.Mul((2 / torch.pi) ** 0.5, cubic))))


def _activate(h: Value, activation: str) -> Value:
    match activation:
        case "silu":
            return op.Mul(h, op.Sigmoid(h))
        case "gelu":
            return _gelu(h)
        case "gelu_tanh":
            return _gelu_tanh(h)
        case "relu":
            return _relu(h)
        case _:
            return op.Mul(_relu(h), _relu(h))
