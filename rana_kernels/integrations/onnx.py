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


def translation_table() -> dict[OpOverload, Callable]:
    """What `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` needs to know of our ops."""
    return {getattr(torch.ops.rana, name).default: globals()[name] for name in ops.SCHEMAS}


def linear(x: Value, weight: Value, bias: Value | None = None) -> Value:
    return op.CastLike(_product(_wide(x), op.Transpose(weight, perm=[1, 0]), bias), x)


def masked_linear(
    h: Value, rows: Value, threshold: Value, scale: Value | None = None, bias: Value | None = None
) -> Value:
    return op.CastLike(_product(_masked(_wide(h), threshold, scale), rows, bias), h)


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
    down_scale: Value,
    down_threshold: Value,
    down_bias: Value | None,
    activation: str,
) -> Value:
    z = _masked(_ranks(x, B), threshold)
    up = _product(_part(z, 0, up_rows.shape[0]), up_rows, up_bias)
    if gate_rows is None:
        g = _activate(up, activation)
    else:
        # shared ranks: gate reads what up reads; separate ranks: what follows it
        first = B.shape[0] - gate_rows.shape[0]
        gate = _product(_part(z, first, B.shape[0]), gate_rows, gate_bias)
        g = op.Mul(_activate(gate, activation), up)
    return op.CastLike(_product(_masked(g, down_threshold, down_scale), down_rows, down_bias), x)


def _wide(t: Value) -> Value:
    return op.Cast(t, to=DataType.FLOAT)


def _ranks(x: Value, B: Value) -> Value:
    return op.MatMul(_wide(x), op.Transpose(_wide(B), perm=[1, 0]))


def _masked(h: Value, threshold: Value, scale: Value | None = None) -> Value:
    """`h`, or 0 where `|h|·scale < threshold`: NaN is never less."""
    score = op.Abs(h) if scale is None else op.Mul(op.Abs(h), scale)
    return op.Where(op.Less(score, threshold), 0.0, h)


def _product(z: Value, rows: Value, bias: Value | None) -> Value:
    y = op.MatMul(z, _wide(rows))
    return y if bias is None else op.Add(y, _wide(bias))


def _part(z: Value, first: int, last: int) -> Value:
    return op.Slice(z, [first], [last], [-1])


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
