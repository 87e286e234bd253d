"""The ops on DTensors: which layouts of their arguments give which layout of the result.

For programs that place tensors themselves. DTensor brings arguments into the nearest layout of these lists,
and refuses an op that has none. Whatever the op, tokens can be cut (they do not depend on each other), or
nothing. Columns of `rows` make columns of y. Ranks or neurons can be cut where h is complete: y is then
a partial sum, and so is the bias, which one process adds. The ranks of `masked_mlp` cannot: an
activation stands between them and y.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

WHOLE, ROW, COLUMN, PARTIAL = Replicate(), Shard(0), Shard(1), Partial()
Layout = tuple[list[Any], list[Any]]


def _tokens(x: Any, others: list[Any]) -> list[Layout]:
    """Nothing cut, and every leading dimension of x cut."""
    whole = [None if other is None else WHOLE for other in others]
    cuts = [Shard(dimension) for dimension in range(x.ndim - 1)]
    return [([cut], [cut, *whole]) for cut in (WHOLE, *cuts)]


def _given(layouts: list[Layout], arguments: list[Any]) -> list[Layout]:
    """The same without a layout for arguments that are None or no tensors."""
    return [
        (result, [place if hasattr(a, "ndim") else None for place, a in zip(places, arguments, strict=True)])
        for result, places in layouts
    ]


def _of_rows(threshold: Any) -> Any:
    """One threshold for all rows is in no row's part."""
    return ROW if threshold.ndim else WHOLE


@register_sharding(torch.ops.rana.masked_linear.default)
def _masked_linear(h, rows, threshold, norms=None, bias=None):
    last, arguments = Shard(h.ndim - 1), [h, rows, threshold, norms, bias]
    columns = ([last], [WHOLE, COLUMN, WHOLE, WHOLE, ROW])
    ranks = ([PARTIAL], [last, ROW, _of_rows(threshold), ROW, PARTIAL])
    return _given([*_tokens(h, arguments[1:]), columns, ranks], arguments)


@register_sharding(torch.ops.rana.masked_lowrank_linear.default)
def _masked_lowrank_linear(x, B, rows, threshold, bias=None):
    last, arguments = Shard(x.ndim - 1), [x, B, rows, threshold, bias]
    columns = ([last], [WHOLE, WHOLE, COLUMN, WHOLE, ROW])
    ranks = ([PARTIAL], [WHOLE, ROW, ROW, _of_rows(threshold), PARTIAL])
    return _given([*_tokens(x, arguments[1:]), columns, ranks], arguments)


@register_sharding(torch.ops.rana.masked_mlp.default)
def _masked_mlp(
    x, B, up_rows, gate_rows, threshold, up_bias, gate_bias, down_rows, down_norms, down_threshold, down_bias,
    activation,
):  # fmt: skip
    up_and_gate = [B, up_rows, gate_rows, threshold, up_bias, gate_bias]
    down = [down_rows, down_norms, down_threshold, down_bias]
    arguments = [x, *up_and_gate, *down, activation]
    of_down = [ROW, ROW, _of_rows(down_threshold), PARTIAL]
    neurons = ([PARTIAL], [WHOLE, WHOLE, COLUMN, COLUMN, WHOLE, ROW, ROW, *of_down, None])
    return _given([*_tokens(x, arguments[1:]), neurons], arguments)


@register_sharding(torch.ops.rana.linear.default)
def _linear(x, weight, bias=None):
    last, arguments = Shard(x.ndim - 1), [x, weight, bias]
    columns, inputs = ([last], [WHOLE, ROW, ROW]), ([PARTIAL], [last, COLUMN, PARTIAL])
    return _given([*_tokens(x, arguments[1:]), columns, inputs], arguments)
