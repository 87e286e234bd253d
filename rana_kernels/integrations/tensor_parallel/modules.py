"""The modules of tensor parallelism: adapters divided among P processes. Each holds one share, written _p.

    q, k, v, up, gate   column-parallel   z = gather(mask(x B_pᵀ))     y_p = z rows_p
                        of neurons        z = mask(x)                  y_p = z rows_p
    o                   row-parallel      h_p = scatter(x_p B_pᵀ)      y = sum(mask(h_p) rows_p)
    down                row-parallel                                   y = sum(mask(x_p) rows_p)
    a whole MLP         the first line for up and gate, then the activation, then the last line for down

A mask is not linear, so the process that owns a rank decides its mask in float32, on the complete rank value.
Only then are values rounded and sent. Each op rounds its process's part of y. The parts are summed in
float32, and the bias is added to the sum. The result differs from the result of a single process only by
rounding and the order of sums. (In an MLP, up and gate are rounded before the mask of the neurons, so this
mask can differ too.)

The modules are for inference only: collectives pass no gradient on, and a module raises an error if its
input requires one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist

from rana_kernels.nn.adapters import Handoff
from rana_kernels.nn.base import AdapterModule, wide_product
from rana_kernels.ops import reference
from rana_kernels.ops.checks import wide_dtype, widen
from rana_kernels.ops.mlp import combine, gate_ranks

# the first two collectives have new names since torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_reduce = dist.all_reduce


def _gather(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the [..., C / P] of every process to [..., C], in the order of the processes."""
    size, flat = group.size(), share.reshape(-1, share.shape[-1]).contiguous()
    shares = flat.new_empty(size * flat.shape[0], flat.shape[1])
    _all_gather(shares, flat, group=group)
    whole = shares.view(size, *flat.shape).movedim(0, 1)
    return whole.reshape(*share.shape[:-1], size * share.shape[-1])


def _scatter(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the [..., C] of every process, and return this process's [..., C / P] of the sum."""
    size, width = group.size(), partial.shape[-1] // group.size()
    parts = partial.reshape(-1, size, width).movedim(1, 0).contiguous()
    share = partial.new_empty(parts.shape[1], width)
    _reduce_scatter(share, parts.view(-1, width), group=group)
    return share.view(*partial.shape[:-1], width)


def _sum(partial: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """Sum the [..., N] of every process, add the bias, and round once."""
    total = partial.to(wide_dtype(partial.dtype)).contiguous()
    _all_reduce(total, group=group)
    return (total if bias is None else total + bias).to(partial.dtype)


# the modules that compute one process's share


def _project(x: Tensor, B: Tensor, B_scale: Tensor | None) -> Tensor:
    """Return x Bᵀ in float32, for any dtype of both."""
    if B_scale is not None:
        return torch.ops.rana.linear(widen(x), B, None, B_scale)
    if x.is_cuda and x.dtype.itemsize < 4:  # this makes no copy of B, but torch has it only for CUDA
        return torch.mm(x.reshape(-1, x.shape[-1]), B.T, out_dtype=torch.float32).view(*x.shape[:-1], -1)
    return wide_product(x, B)


def _masked(h: Tensor, threshold: Tensor, norms: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.where(reference.keep(h, threshold, norms), h, 0).to(dtype)


class Piece(AdapterModule):
    """The tensors of this process. They are in no state dict, because a state dict has the whole model.

    A matrix is given with its scale, which is None for floats.
    """

    B: Tensor
    B_scale: Tensor | None
    rows: Tensor
    rows_scale: Tensor | None
    norms: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
            if name.endswith("_scale") and tensor is not None:
                self.matrices[name.removesuffix("_scale")] = 0  # casts then leave the scale alone


class Ranks(Piece):
    """x [..., K] -> z [..., R], both complete. Each process projects and masks its own ranks."""

    def __init__(
        self, B: Tensor, threshold: Tensor, group: dist.ProcessGroup, B_scale: Tensor | None = None
    ) -> None:
        super().__init__(B=B, B_scale=B_scale, threshold=threshold)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return _gather(_masked(_project(x, self.B, self.B_scale), self.threshold, None, x.dtype), self.group)


class Inputs(Piece):
    """x [..., K], complete -> the masked z [..., K], which is the same in every process."""

    def __init__(self, threshold: Tensor, norms: Tensor) -> None:
        super().__init__(threshold=threshold, norms=norms)

    def forward(self, x: Tensor) -> Tensor:
        return _masked(widen(x), self.threshold, self.norms, x.dtype)


class OwnRanks(Piece):
    """x [..., K / P] -> z [..., R / P]. Rank values are summed over processes, then masked by their owner."""

    def __init__(
        self, B: Tensor, threshold: Tensor, group: dist.ProcessGroup, B_scale: Tensor | None = None
    ) -> None:
        super().__init__(B=B, B_scale=B_scale, threshold=threshold)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return _masked(_scatter(_project(x, self.B, self.B_scale), self.group), self.threshold, None, x.dtype)


class Neurons(Piece):
    """g [..., I / P], float32 -> the masked z in `dtype`."""

    def forward(self, g: Tensor, dtype: torch.dtype) -> Tensor:
        return _masked(g, self.threshold, self.norms, dtype)


class Rows(Piece):
    """z [..., R], masked already -> z rows + bias. The op skips rows whose z is 0."""

    def __init__(self, rows: Tensor, rows_scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        tiny = torch.tensor(torch.finfo(torch.float32).tiny, device=rows.device)
        super().__init__(rows=rows, rows_scale=rows_scale, bias=bias, threshold=tiny)

    def forward(self, z: Tensor) -> Tensor:
        return torch.ops.rana.masked_linear(z, self.rows, self.threshold, None, self.bias, self.rows_scale)


class MaskedRows(Piece):
    """A neuron adapter: x [..., I] -> mask(x) rows + bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_linear(
            x, self.rows, self.threshold, self.norms, self.bias, self.rows_scale
        )


class Dense(Piece):
    """A linear that stays dense, at a place where other layers of the model have an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.linear(x, self.weight, self.bias, self.weight_scale)


# the modules that take the place of a linear or an MLP


def _require_no_gradient(x: Tensor) -> None:
    if x.requires_grad:
        raise RuntimeError(
            "tensor-parallel adapters are for inference and pass no gradient on: run the model under "
            "torch.no_grad(), or train it on one device"
        )


class ColumnParallel(nn.Module):
    """x [..., K], complete -> this process's columns of all outputs, or all columns if `gathered`.

    `widths` are the widths of the outputs in this process. `forward` returns the first output, and the
    handoff takes the others.
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
    """x [..., K / P] -> y [..., N], complete. If `split`, x arrives complete and is divided here."""

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
    """A RanaMLP: x [..., K] -> y [..., N], both complete. Each process has its own neurons."""

    bias: Tensor | None

    def __init__(
        self,
        ranks: Ranks | Inputs,
        up: Rows,
        gate: Rows | None,
        neurons: Neurons,
        down: Rows,
        bias: Tensor | None,
        activation: str,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.ranks, self.up, self.gate, self.neurons, self.down = ranks, up, gate, neurons, down
        self.activation, self.group = activation, group
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _require_no_gradient(x)
        z, wide = self.ranks(x), wide_dtype(x.dtype)
        up, gate = self.up(z[..., : self.up.rows.shape[0]]).to(wide), None
        if self.gate is not None:
            gate = self.gate(z[..., gate_ranks(z.shape[-1], self.gate.rows.shape[0])]).to(wide)
        g = combine(up, gate, partial(reference.activate, activation=self.activation))
        return _sum(self.down(self.neurons(g, x.dtype)), self.bias, self.group)
