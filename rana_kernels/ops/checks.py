"""The checks of every op's arguments, for the fake and the reference implementation.

Each check returns N, the width of the op's result.

The compiled backends check the same things in the same words (`csrc/check.h`). A violation raises
`RuntimeError`, as torch's own ops do, and names the argument, what it has and what is wanted.
"""

import torch
from torch import Tensor

from rana_kernels.ops.quantized import GROUPS, columns_of, group_size, groups_of, is_quantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which masks are decided and sums are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(t: Tensor) -> Tensor:
    """Convert a tensor to the dtype in which masks are decided and sums are accumulated."""
    return t.to(wide_dtype(t.dtype))


def _fail(op: str, argument: str, has: object, wanted: str) -> None:
    raise RuntimeError(f"rana::{op}: {argument} has {has}, wanted {wanted}")


def _input(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (*DTYPES, torch.float64):
        _fail(op, name, f"dtype {tensor.dtype}", "float32, bfloat16 or float16")
    if tensor.dim() == 0:
        _fail(op, name, "shape []", "at least one dimension")


def _same_place(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    if tensor.dtype != dtype:
        _fail(op, name, f"dtype {tensor.dtype}", f"{dtype}")
    if tensor.device != like.device:
        _fail(op, name, f"device {tensor.device}", f"{like.device}, the device of the input")


def _contiguous_rows(op: str, name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1 and tensor.shape[0] > 0:
        _fail(
            op,
            name,
            f"strides {list(tensor.stride())}",
            "rows that are contiguous: call .contiguous() once, where the weights are loaded",
        )


def _matrix(op: str, name: str, tensor: Tensor, rows: int | None, columns: int | None) -> None:
    fits = tensor.dim() == 2
    fits = fits and (rows is None or tensor.shape[0] == rows)
    fits = fits and (columns is None or tensor.shape[1] == columns)
    if not fits:
        wanted = f"[{'any' if rows is None else rows}, {'any' if columns is None else columns}]"
        _fail(op, name, f"shape {list(tensor.shape)}", f"shape {wanted}")
    _contiguous_rows(op, name, tensor)


def _scale(op: str, name: str, scale: Tensor, rows: int, columns: int, like: Tensor) -> None:
    _same_place(op, name, scale, torch.float16, like)
    fits = scale.dim() == 2 and scale.shape[0] == rows and group_size(columns, scale.shape[1]) is not None
    if not fits:
        sizes = dict.fromkeys(groups_of(columns, g) for g in (*GROUPS, columns))
        wanted = " or ".join(f"[{rows}, {groups}]" for groups in sizes)
        _fail(
            op, name, f"shape {list(scale.shape)}", f"shape {wanted}, a scale for 32, 64, 128 or all columns"
        )
    _contiguous_rows(op, name, scale)


def _weight(
    op: str,
    name: str,
    weight: Tensor,
    scale: Tensor | None,
    rows: int | None,
    columns: int | None,
    like: Tensor,
) -> int:
    """Check a matrix of weights, float or quantised, and its scale. Return how many columns it has."""
    scale_name = name.removesuffix("_rows") + "_scale"
    if scale is None:
        if is_quantized(weight):
            _fail(op, name, f"dtype {weight.dtype}", f"{like.dtype}, or {scale_name} beside it")
        _same_place(op, name, weight, like.dtype, like)
        _matrix(op, name, weight, rows, columns)
        return weight.shape[1]
    if not is_quantized(weight):
        _fail(op, name, f"dtype {weight.dtype}", f"int8 or uint8, because {scale_name} is given")
    _same_place(op, name, weight, weight.dtype, like)
    stored = (columns + 1) // 2 if columns is not None and weight.dtype == torch.uint8 else columns
    _matrix(op, name, weight, rows, stored)
    columns = columns_of(weight) if columns is None else columns
    _scale(op, scale_name, scale, weight.shape[0], columns, like)
    return columns


def _vector(op: str, name: str, tensor: Tensor | None, size: int, dtype: torch.dtype, like: Tensor) -> None:
    if tensor is None:
        return
    _same_place(op, name, tensor, dtype, like)
    if list(tensor.shape) != [size]:
        _fail(op, name, f"shape {list(tensor.shape)}", f"shape [{size}]")


def _absent(op: str, name: str, tensor: Tensor | None, because: str) -> None:
    if tensor is not None:
        _fail(op, name, "a value", f"None, because {because}")


def _threshold(op: str, name: str, tensor: Tensor, size: int, like: Tensor) -> None:
    _same_place(op, name, tensor, wide_dtype(like.dtype), like)
    if tensor.dim() != 0 and list(tensor.shape) != [size]:
        _fail(op, name, f"shape {list(tensor.shape)}", f"shape [] or [{size}]")


def masked_linear(
    h: Tensor,
    rows: Tensor,
    threshold: Tensor,
    norms: Tensor | None,
    bias: Tensor | None,
    rows_scale: Tensor | None,
) -> int:
    op = "masked_linear"
    _input(op, "h", h)
    ranks = h.shape[-1]
    columns = _weight(op, "rows", rows, rows_scale, ranks, None, h)
    _threshold(op, "threshold", threshold, ranks, h)
    _vector(op, "norms", norms, ranks, wide_dtype(h.dtype), h)
    _vector(op, "bias", bias, columns, h.dtype, h)
    return columns


def masked_lowrank_linear(
    x: Tensor,
    B: Tensor,
    rows: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    B_scale: Tensor | None,
    rows_scale: Tensor | None,
) -> int:
    op = "masked_lowrank_linear"
    _input(op, "x", x)
    _weight(op, "B", B, B_scale, None, x.shape[-1], x)
    columns = _weight(op, "rows", rows, rows_scale, B.shape[0], None, x)
    _threshold(op, "threshold", threshold, B.shape[0], x)
    _vector(op, "bias", bias, columns, x.dtype, x)
    return columns


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
    B_scale: Tensor | None,
    up_scale: Tensor | None,
    gate_scale: Tensor | None,
    down_scale: Tensor | None,
) -> int:
    op = "masked_mlp"
    _input(op, "x", x)
    size = x.shape[-1]
    neurons = _weight(op, "up_rows", up_rows, up_scale, size if B is None else None, None, x)
    if gate_rows is not None:
        _weight(op, "gate_rows", gate_rows, gate_scale, size if B is None else None, neurons, x)
    else:
        _absent(op, "gate_bias", gate_bias, "gate_rows is None")
        _absent(op, "gate_scale", gate_scale, "gate_rows is None")
    if B is None:
        _absent(op, "B_scale", B_scale, "B is None")
        _threshold(op, "threshold", threshold, size, x)
        _vector(op, "norms", norms, size, wide_dtype(x.dtype), x)
    else:
        _weight(op, "B", B, B_scale, None, size, x)
        _stacked_ranks(op, B, up_rows, gate_rows)
        _absent(op, "norms", norms, "B is given and the norms of ranks are 1")
        _vector(op, "threshold", threshold, B.shape[0], wide_dtype(x.dtype), x)
    _vector(op, "up_bias", up_bias, neurons, x.dtype, x)
    _vector(op, "gate_bias", gate_bias, neurons, x.dtype, x)
    columns = _weight(op, "down_rows", down_rows, down_scale, neurons, None, x)
    _vector(op, "down_norms", down_norms, neurons, wide_dtype(x.dtype), x)
    _threshold(op, "down_threshold", down_threshold, neurons, x)
    _vector(op, "down_bias", down_bias, columns, x.dtype, x)
    if activation not in ACTIVATIONS:
        _fail(op, "activation", repr(activation), "one of " + ", ".join(ACTIVATIONS))
    return columns


def _stacked_ranks(op: str, B: Tensor, up_rows: Tensor, gate_rows: Tensor | None) -> None:
    """Check that B has a row for each rank of up and gate, or one for both where they are joint."""
    has, up = f"{B.shape[0]} rows", up_rows.shape[0]
    if gate_rows is None:
        if B.shape[0] != up:
            _fail(op, "B", has, f"{up}, the rows of up_rows")
        return
    gate = gate_rows.shape[0]
    if B.shape[0] != up + gate and not B.shape[0] == up == gate:
        stacked = f"{up + gate} (up's {up} over gate's {gate})"
        _fail(op, "B", has, f"{stacked}, or as many as up_rows and gate_rows each (joint ranks)")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> int:
    op = "linear"
    _input(op, "x", x)
    _weight(op, "weight", weight, weight_scale, None, x.shape[-1], x)
    _vector(op, "bias", bias, weight.shape[0], x.dtype, x)
    return weight.shape[0]
