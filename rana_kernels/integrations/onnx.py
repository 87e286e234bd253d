"""ONNX: each op of `torch.ops.rana` in standard ONNX operators, for `torch.onnx.export`.

The exported model computes the same results as the ops: masks are decided on float32 values, and NaN is
kept. It uses dense matrix products, so an ONNX runtime skips no work: a rank adapter costs `R·(K + N)` a
token for any mask. float16 and bfloat16 are converted to float32 and back, and quantised weights to float32.
The export needs the packages onnx and onnxscript.
"""

from collections.abc import Callable

import torch
from onnxscript import opset18 as op
from onnxscript.ir import DataType, Value
from torch._ops import OpOverload

from rana_kernels import ops
from rana_kernels.ops.mlp import gate_ranks
from rana_kernels.ops.quantized import BLOCK, group_size


def translation_table() -> dict[OpOverload, Callable]:
    """Return the table for `torch.onnx.export(..., dynamo=True, custom_translation_table=...)`."""
    return {getattr(torch.ops.rana, name).default: globals()[name] for name in ops.SCHEMAS}


def linear(x: Value, weight: Value, bias: Value | None = None, weight_scale: Value | None = None) -> Value:
    wide_weight = _weight(weight, weight_scale, _columns(x))
    return op.CastLike(_product(_wide(x), op.Transpose(wide_weight, perm=[1, 0]), bias), x)


def masked_linear(
    h: Value,
    rows: Value,
    threshold: Value,
    norms: Value | None = None,
    bias: Value | None = None,
    rows_scale: Value | None = None,
) -> Value:
    return op.CastLike(_product(_masked(_wide(h), threshold, norms), _weight(rows, rows_scale), bias), h)


def masked_lowrank_linear(
    x: Value,
    B: Value,
    rows: Value,
    threshold: Value,
    bias: Value | None = None,
    B_scale: Value | None = None,
    rows_scale: Value | None = None,
) -> Value:
    z = _masked(_ranks(x, B, B_scale), threshold)
    return op.CastLike(_product(z, _weight(rows, rows_scale), bias), x)


def masked_mlp(
    x: Value,
    B: Value | None,
    up_rows: Value,
    gate_rows: Value | None,
    threshold: Value,
    norms: Value | None,
    up_bias: Value | None,
    gate_bias: Value | None,
    down_rows: Value,
    down_norms: Value,
    down_threshold: Value,
    down_bias: Value | None,
    activation: str,
    B_scale: Value | None = None,
    up_scale: Value | None = None,
    gate_scale: Value | None = None,
    down_scale: Value | None = None,
) -> Value:
    z = _masked(_wide(x) if B is None else _ranks(x, B, B_scale), threshold, norms)
    up = _product(_part(z, slice(0, up_rows.shape[0])), _weight(up_rows, up_scale), up_bias)
    if gate_rows is None:
        g = _activate(up, activation)
    else:
        size = up_rows.shape[0] if B is None else B.shape[0]
        gate_z = _part(z, gate_ranks(size, gate_rows.shape[0]))
        gate = _product(gate_z, _weight(gate_rows, gate_scale), gate_bias)
        g = op.Mul(_activate(gate, activation), up)
    z = _masked(g, down_threshold, down_norms)
    return op.CastLike(_product(z, _weight(down_rows, down_scale), down_bias), x)


def _wide(t: Value) -> Value:
    return op.Cast(t, to=DataType.FLOAT)


def _ranks(x: Value, B: Value, B_scale: Value | None) -> Value:
    return op.MatMul(_wide(x), op.Transpose(_weight(B, B_scale, _columns(x)), perm=[1, 0]))


def _columns(x: Value) -> int | None:
    """Return the last size of x if it is known, which tells whether a 4-bit weight has an odd width."""
    last = None if x.shape is None else x.shape[-1]
    return last if isinstance(last, int) else None


def _weight(weight: Value, scale: Value | None, columns: int | None = None) -> Value:
    """Return a weight of any format as float32, by operators that a runtime can fold into a constant."""
    if scale is None:
        return _wide(weight)
    rows, stored = weight.shape
    packed = weight.dtype == DataType.UINT8
    columns = (2 * stored if packed else stored) if columns is None else columns
    values, groups = _unpacked(weight, columns) if packed else _wide(weight), scale.shape[1]
    group = group_size(columns, groups)
    every = op.Expand(op.Unsqueeze(_wide(scale), [2]), [rows, groups, group])
    steps = op.Reshape(every, [rows, groups * group])
    return op.Mul(values, op.Slice(steps, [0], [columns], [1]))


def _unpacked(packed: Value, columns: int) -> Value:
    """Return the values of a packed 4-bit weight [R, columns], as `ops.quantized.unpack_int4` does."""
    rows, stored = packed.shape
    byte = _wide(packed)
    high = op.Floor(op.Mul(byte, 1 / 16))
    low = op.Sub(byte, op.Mul(high, 16.0))
    low, high = (op.Where(op.Less(part, 8.0), part, op.Sub(part, 16.0)) for part in (low, high))
    whole = columns // BLOCK * BLOCK
    blocks = (op.Reshape(_columns_of(part, 0, whole // 2), [rows, -1, BLOCK // 2]) for part in (low, high))
    rest = (op.Unsqueeze(_columns_of(part, whole // 2, stored), [2]) for part in (low, high))
    parts = [op.Reshape(op.Concat(*blocks, axis=2), [rows, whole])] if whole else []
    if whole < columns:
        last = op.Reshape(op.Concat(*rest, axis=2), [rows, 2 * stored - whole])
        parts.append(_columns_of(last, 0, columns - whole))
    return op.Concat(*parts, axis=1)


def _columns_of(matrix: Value, start: int, stop: int) -> Value:
    return op.Slice(matrix, [start], [stop], [1])


def _masked(h: Value, threshold: Value, norms: Value | None = None) -> Value:
    """Return `h`, with 0 where `|h|·norms < threshold`. NaN is not less, so it is kept."""
    score = op.Abs(h) if norms is None else op.Mul(op.Abs(h), norms)
    return op.Where(op.Less(score, threshold), 0.0, h)


def _product(z: Value, wide_rows: Value, bias: Value | None) -> Value:
    y = op.MatMul(z, wide_rows)
    return y if bias is None else op.Add(y, _wide(bias))


def _part(z: Value, ranks: slice) -> Value:
    return op.Slice(z, [ranks.start], [ranks.stop], [-1])


def _relu(h: Value) -> Value:
    # runtimes disagree on the result of the operator Relu for NaN
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
