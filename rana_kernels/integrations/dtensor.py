"""The ops on DTensors, for programs that place tensors themselves.

For each op there is a list of layouts: how the arguments are divided, and how the result then is. DTensor
converts the arguments to the nearest layout of the list. Without a list, it refuses the op.

tokens            every op allows any leading dimension of x to be divided, because tokens are independent
columns           if the columns of `rows` are divided, so are the columns of y
ranks, neurons    can be divided if h is complete. y is then a partial sum, and so is the bias, which only
                  one process adds. The ranks of `masked_mlp` cannot be divided, because an activation comes
                  between them and y
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
def _masked_linear(h, rows, threshold, norms=None, bias=None):
    last, arguments = Shard(h.ndim - 1), [h, rows, threshold, norms, bias]
    columns = ([last], [WHOLE, COLUMN, WHOLE, WHOLE, ROW])
    ranks = ([PARTIAL], [last, ROW, _divided_by_rows(threshold), ROW, PARTIAL])
    return _tensors_only([*_tokens(h, arguments[1:]), columns, ranks], arguments)


@register_sharding(torch.ops.rana.masked_lowrank_linear.default)
def _masked_lowrank_linear(x, B, rows, threshold, bias=None):
    last, arguments = Shard(x.ndim - 1), [x, B, rows, threshold, bias]
    columns = ([last], [WHOLE, WHOLE, COLUMN, WHOLE, ROW])
    ranks = ([PARTIAL], [WHOLE, ROW, ROW, _divided_by_rows(threshold), PARTIAL])
    return _tensors_only([*_tokens(x, arguments[1:]), columns, ranks], arguments)


@register_sharding(torch.ops.rana.masked_mlp.default)
def _masked_mlp(
    x, B, up_rows, gate_rows, threshold, up_bias, gate_bias, down_rows, down_norms, down_threshold, down_bias,
    activation,
):  # fmt: skip
    up_and_gate = [B, up_rows, gate_rows, threshold, up_bias, gate_bias]
    down = [down_rows, down_norms, down_threshold, down_bias]
    arguments = [x, *up_and_gate, *down, activation]
    of_down = [ROW, ROW, _divided_by_rows(down_threshold), PARTIAL]
    neurons = ([PARTIAL], [WHOLE, WHOLE, COLUMN, COLUMN, WHOLE, ROW, ROW, *of_down, None])
    return _tensors_only([*_tokens(x, arguments[1:]), neurons], arguments)


@register_sharding(torch.ops.rana.linear.default)
def _linear(x, weight, bias=None):
    last, arguments = Shard(x.ndim - 1), [x, weight, bias]
    columns, inputs = ([last], [WHOLE, ROW, ROW]), ([PARTIAL], [last, COLUMN, PARTIAL])
    return _tensors_only([*_tokens(x, arguments[1:]), columns, inputs], arguments)
