"""What each op accepts, checked in one place for the fake and the reference implementation.

The compiled backends check the same things in the same words (`csrc/check.h`). A violation raises
`RuntimeError`, as torch's own ops do, and names the argument, what it has and what is wanted.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that masks are decided and sums are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _matrix(op: str, name: str, tensor: Tensor, rows: int | None, columns: int | None, like: Tensor) -> None:
    _same_place(op, name, tensor, like.dtype, like)
    fits = tensor.dim() == 2
    fits = fits and (rows is None or tensor.shape[0] == rows)
    fits = fits and (columns is None or tensor.shape[1] == columns)
    if not fits:
        wanted = f"[{'any' if rows is None else rows}, {'any' if columns is None else columns}]"
        _fail(op, name, f"shape {list(tensor.shape)}", f"shape {wanted}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1 and tensor.shape[0] > 0:
        _fail(
            op,
            name,
            f"strides {list(tensor.stride())}",
            "rows that are contiguous: call .contiguous() once, where the weights are loaded",
        )


def _vector(op: str, name: str, tensor: Tensor | None, size: int, dtype: torch.dtype, like: Tensor) -> None:
    if tensor is None:
        return
    _same_place(op, name, tensor, dtype, like)
    if list(tensor.shape) != [size]:
        _fail(op, name, f"shape {list(tensor.shape)}", f"shape [{size}]")


def _threshold(op: str, name: str, tensor: Tensor, size: int, like: Tensor) -> None:
    _same_place(op, name, tensor, wide_dtype(like.dtype), like)
    if tensor.dim() != 0 and list(tensor.shape) != [size]:
        _fail(op, name, f"shape {list(tensor.shape)}", f"shape [] or [{size}]")


def masked_linear(
    h: Tensor, rows: Tensor, threshold: Tensor, norms: Tensor | None, bias: Tensor | None
) -> None:
    op = "masked_linear"
    _input(op, "h", h)
    ranks = h.shape[-1]
    _matrix(op, "rows", rows, ranks, None, h)
    _threshold(op, "threshold", threshold, ranks, h)
    _vector(op, "norms", norms, ranks, wide_dtype(h.dtype), h)
    _vector(op, "bias", bias, rows.shape[1], h.dtype, h)


def masked_lowrank_linear(x: Tensor, B: Tensor, rows: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    op = "masked_lowrank_linear"
    _input(op, "x", x)
    _matrix(op, "B", B, None, x.shape[-1], x)
    _matrix(op, "rows", rows, B.shape[0], None, x)
    _threshold(op, "threshold", threshold, B.shape[0], x)
    _vector(op, "bias", bias, rows.shape[1], x.dtype, x)


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
) -> None:
    op = "masked_mlp"
    _input(op, "x", x)
    _matrix(op, "B", B, None, x.shape[-1], x)
    _matrix(op, "up_rows", up_rows, None, None, x)
    neurons = up_rows.shape[1]
    if gate_rows is None:
        if B.shape[0] != up_rows.shape[0]:
            _fail(op, "B", f"{B.shape[0]} rows", f"{up_rows.shape[0]}, the rows of up_rows")
        if gate_bias is not None:
            _fail(op, "gate_bias", "a value", "None, because gate_rows is None")
    else:
        _matrix(op, "gate_rows", gate_rows, None, neurons, x)
        up, gate = up_rows.shape[0], gate_rows.shape[0]
        if B.shape[0] != up + gate and not B.shape[0] == up == gate:
            _fail(
                op,
                "B",
                f"{B.shape[0]} rows",
                f"{up + gate} (up's {up} over gate's {gate}), "
                "or as many as up_rows and gate_rows each (shared ranks)",
            )
    _vector(op, "threshold", threshold, B.shape[0], wide_dtype(x.dtype), x)
    _vector(op, "up_bias", up_bias, neurons, x.dtype, x)
    _vector(op, "gate_bias", gate_bias, neurons, x.dtype, x)
    _matrix(op, "down_rows", down_rows, neurons, None, x)
    _vector(op, "down_norms", down_norms, neurons, wide_dtype(x.dtype), x)
    _threshold(op, "down_threshold", down_threshold, neurons, x)
    _vector(op, "down_bias", down_bias, down_rows.shape[1], x.dtype, x)
    if activation not in ACTIVATIONS:
        _fail(op, "activation", repr(activation), "one of " + ", ".join(ACTIVATIONS))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear"
    _input(op, "x", x)
    _matrix(op, "weight", weight, None, x.shape[-1], x)
    _vector(op, "bias", bias, weight.shape[0], x.dtype, x)
