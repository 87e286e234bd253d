"""The ops on DTensors, for programs that place tensors themselves.

For each op there is a list of layouts: how the arguments are divided, and how the result then is. DTensor
converts the arguments to the nearest layout of the list. Without a list, it refuses the op.

tokens            every op allows any leading dimension of x to be divided, because tokens are independent
columns           if the columns of `rows` are divided, so are the columns of y
ranks, neurons    can be divided if h is complete. y is then a partial sum, and so is the bias, which only
                  one process adds. The ranks of `masked_mlp` cannot be divided, because an activation comes
                  between them and y

The columns of a quantised weight are not divided, because a part may end inside a group or inside a block of
packed bytes. Its rows are divided together with the rows of its scale.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

WHOLE, ROW, COLUMN, PARTIAL = Replicate(), Shard(0), Shard(1), Partial()
Layout = tuple[list[Any], list[Any]]


def _tokens(x: Any, others: list[Any]) -> list[Layout]:
    """Return the layouts that divide nothing, or one leading dimension of x."""
    whole = [None if other is None else WHOLE for other in others]
    divided = [Shard(dimension) for dimension in range(x.ndim - 1)]
    return [([place], [place, *whole]) for place in (WHOLE, *divided)]


def _tensors_only(layouts: list[Layout], arguments: list[Any]) -> list[Layout]:
    """Return the layouts with None for arguments that are None or no tensors."""
    return [
        (result, [place if hasattr(a, "ndim") else None for place, a in zip(places, arguments, strict=True)])
        for result, places in layouts
    ]


def _divided_by_rows(threshold: Any) -> Any:
    """Return the layout of a threshold when rows are divided. A single threshold is not divided."""
    return ROW if threshold.ndim else WHOLE


@register_sharding(torch.ops.rana.masked_linear.default)
def _masked_linear(h, rows, threshold, norms=None, bias=None, rows_scale=None):
    last, arguments = Shard(h.ndim - 1), [h, rows, threshold, norms, bias, rows_scale]
    layouts = _tokens(h, arguments[1:])
    layouts.append(([PARTIAL], [last, ROW, _divided_by_rows(threshold), ROW, PARTIAL, ROW]))
    if rows_scale is None:
        layouts.append(([last], [WHOLE, COLUMN, WHOLE, WHOLE, ROW, None]))
    return _tensors_only(layouts, arguments)


@register_sharding(torch.ops.rana.masked_lowrank_linear.default)
def _masked_lowrank_linear(x, B, rows, threshold, bias=None, B_scale=None, rows_scale=None):
    last, arguments = Shard(x.ndim - 1), [x, B, rows, threshold, bias, B_scale, rows_scale]
    layouts = _tokens(x, arguments[1:])
    layouts.append(([PARTIAL], [WHOLE, ROW, ROW, _divided_by_rows(threshold), PARTIAL, ROW, ROW]))
    if rows_scale is None:
        layouts.append(([last], [WHOLE, WHOLE, COLUMN, WHOLE, ROW, WHOLE, None]))
    return _tensors_only(layouts, arguments)


@register_sharding(torch.ops.rana.masked_mlp.default)
def _masked_mlp(
    x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias, down_rows, down_norms, down_threshold,
    down_bias, activation, B_scale=None, up_scale=None, gate_scale=None, down_scale=None,
):  # fmt: skip
    up_and_gate = [B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias]
    down = [down_rows, down_norms, down_threshold, down_bias]
    arguments = [x, *up_and_gate, *down, activation, B_scale, up_scale, gate_scale, down_scale]
    layouts = _tokens(x, arguments[1:])
    if up_scale is None and gate_scale is None:
        of_up_and_gate = [WHOLE, COLUMN, COLUMN, WHOLE, WHOLE, ROW, ROW]
        of_down = [ROW, ROW, _divided_by_rows(down_threshold), PARTIAL]
        layouts.append(([PARTIAL], [WHOLE, *of_up_and_gate, *of_down, None, WHOLE, None, None, ROW]))
    return _tensors_only(layouts, arguments)


@register_sharding(torch.ops.rana.linear.default)
def _linear(x, weight, bias=None, weight_scale=None):
    last, arguments = Shard(x.ndim - 1), [x, weight, bias, weight_scale]
    layouts = _tokens(x, arguments[1:])
    layouts.append(([last], [WHOLE, ROW, ROW, ROW]))
    if weight_scale is None:
        layouts.append(([PARTIAL], [last, COLUMN, PARTIAL, None]))
    return _tensors_only(layouts, arguments)
