"""Tensor parallelism: adapters cut for P processes, each of which holds one share (written _p).

    q, k, v, up, gate   column-parallel   z = gather(mask(x B_pᵀ))     y_p = z rows_p              x is whole
    o                   row-parallel      h_p = scatter(x_p B_pᵀ)      y = sum(mask(h_p) rows_p)
    down                row-parallel                                   y = sum(mask(x_p) rows_p)
    a whole MLP                           the first, the activation, then the last

A mask is not linear: it is decided on complete rank values, by the process that owns the rank, in float32.
Only then are values rounded and sent. Every process's part of y is rounded by its op; the parts are summed in
float32, and the bias is added to the sum. So the result differs from that of one process only as rounding and
the order of sums do. (In an MLP that includes the masks of its neurons: up and gate are rounded before.)

For inference: no gradient goes through the collectives, and asking for one is an error.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist

from rana_kernels.nn.adapters import AdapterModule, Handoff
from rana_kernels.ops import reference
from rana_kernels.ops.checks import wide_dtype
from rana_kernels.ops.mlp import combine, gate_ranks

# collectives, on the last dimension. The first two have new names since torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_reduce = dist.all_reduce


def _gather(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., C / P] of every process -> [..., C], in the order of the processes."""
    size, flat = group.size(), share.reshape(-1, share.shape[-1]).contiguous()
    shares = flat.new_empty(size * flat.shape[0], flat.shape[1])
    _all_gather(shares, flat, group=group)
    whole = shares.view(size, *flat.shape).movedim(0, 1)
    return whole.reshape(*share.shape[:-1], size * share.shape[-1])


def _scatter(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., C] of every process -> this one's [..., C / P] of their sum."""
    size, width = group.size(), partial.shape[-1] // group.size()
    parts = partial.reshape(-1, size, width).movedim(1, 0).contiguous()
    share = partial.new_empty(parts.shape[1], width)
    _reduce_scatter(share, parts.view(-1, width), group=group)
    return share.view(*partial.shape[:-1], width)


def _sum(partial: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """[..., N] of every process -> their sum, plus the bias, rounded once."""
    total = partial.to(wide_dtype(partial.dtype)).contiguous()
    _all_reduce(total, group=group)
    return (total if bias is None else total + bias).to(partial.dtype)


# what one process computes


def _project(x: Tensor, B: Tensor) -> Tensor:
    """x Bᵀ, in float32 whatever the dtype of both."""
    if x.is_cuda and x.dtype.itemsize < 4:  # without a copy of B; torch has this for cards alone
        return torch.mm(x.reshape(-1, x.shape[-1]), B.T, out_dtype=torch.float32).view(*x.shape[:-1], -1)
    return x.to(wide_dtype(x.dtype)) @ B.to(wide_dtype(B.dtype)).T


def _masked(h: Tensor, threshold: Tensor, norms: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.where(reference.keep(h, threshold, norms), h, 0).to(dtype)


class Piece(AdapterModule):
    """Tensors of this process: in no state dict, which is that of the whole model."""

    B: Tensor
    rows: Tensor
    norms: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class Ranks(Piece):
    """x [..., K], whole -> z [..., R], whole: each process projects and masks its own ranks."""

    def __init__(self, B: Tensor, threshold: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(B=B, threshold=threshold)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return _gather(_masked(_project(x, self.B), self.threshold, None, x.dtype), self.group)


class OwnRanks(Piece):
    """x [..., K / P] -> z [..., R / P]: rank values are completed before their owner masks them."""

    def __init__(self, B: Tensor, threshold: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(B=B, threshold=threshold)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return _masked(_scatter(_project(x, self.B), self.group), self.threshold, None, x.dtype)


class Neurons(Piece):
    """g [..., I / P], float32 -> z in `dtype`, masked."""

    def forward(self, g: Tensor, dtype: torch.dtype) -> Tensor:
        return _masked(g, self.threshold, self.norms, dtype)


class Rows(Piece):
    """z [..., R] -> z rows + bias, where z was masked before: rows of zeros are skipped."""

    def __init__(self, rows: Tensor, bias: Tensor | None) -> None:
        smallest = torch.tensor(torch.finfo(torch.float32).tiny, device=rows.device)
        super().__init__(rows=rows, bias=bias, threshold=smallest)

    def forward(self, z: Tensor) -> Tensor:
        return torch.ops.rana.masked_linear(z, self.rows, self.threshold, None, self.bias)


class MaskedRows(Piece):
    """A neuron adapter: x [..., I] -> mask(x) rows + bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_linear(x, self.rows, self.threshold, self.norms, self.bias)


class Dense(Piece):
    """A linear that was not adapted, in a layer whose others were."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.linear(x, self.weight, self.bias)


# what stands in a linear's place


def _require_no_gradient(x: Tensor) -> None:
    if x.requires_grad:
        raise RuntimeError(
            "tensor-parallel adapters are for inference and pass no gradient on: run the model under "
            "torch.no_grad(), or train it on one device"
        )


class ColumnParallel(nn.Module):
    """x [..., K], whole -> this process's columns of every linear that reads it; `gathered`: all columns.

    `widths` are those of this process: the first output is returned, the rest go to the handoff.
    """

    def __init__(
        self,
        inner: nn.Module,
        widths: tuple[int, ...],
        group: dist.ProcessGroup,
        *,
        handoff: Handoff | None = None,
        gathered: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.widths, self.group = inner, widths, group
        self.handoff, self.gathered = handoff, gathered

    def forward(self, x: Tensor) -> Tensor:
        _require_no_gradient(x)
        outputs = self.inner(x).split(self.widths, dim=-1)
        if self.gathered:
            outputs = [_gather(y, self.group) for y in outputs]
        return outputs[0] if self.handoff is None else self.handoff.share(x, outputs)


class RowParallel(nn.Module):
    """x [..., K / P] -> y [..., N], whole; `split`: x comes whole, and is cut here."""

    bias: Tensor | None

    def __init__(
        self, inner: nn.Module, bias: Tensor | None, group: dist.ProcessGroup, *, split: bool = False
    ) -> None:
        super().__init__()
        self.inner, self.group, self.split = inner, group, split
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _require_no_gradient(x)
        own = x.chunk(self.group.size(), dim=-1)[self.group.rank()] if self.split else x
        return _sum(self.inner(own), self.bias, self.group)


class ParallelMLP(nn.Module):
    """A RanaMLP: x [..., K], whole -> y [..., N], whole. Each process has its own neurons."""

    bias: Tensor | None

    def __init__(
        self,
        ranks: Ranks,
        up: Rows,
        gate: Rows | None,
        neurons: Neurons,
        down: Rows,
        bias: Tensor | None,
        activation: str,
    ) -> None:
        super().__init__()
        self.ranks, self.up, self.gate, self.neurons, self.down = ranks, up, gate, neurons, down
        self.activation = activation
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _require_no_gradient(x)
        z, wide = self.ranks(x), wide_dtype(x.dtype)
        up, gate = self.up(z[..., : self.up.rows.shape[0]]).to(wide), None
        if self.gate is not None:
            gate = self.gate(z[..., gate_ranks(z.shape[-1], self.gate.rows.shape[0])]).to(wide)
        g = combine(up, gate, partial(reference.activate, activation=self.activation))
        return _sum(self.down(self.neurons(g, x.dtype)), self.bias, self.ranks.group)
