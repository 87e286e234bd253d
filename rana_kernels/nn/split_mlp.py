"""A RanaMLP split into one module for each linear, for code that works on single linears."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.nn.adapters import RanaNeuronLinear, joint_linears
from rana_kernels.nn.base import AdaptedLinear, fill_module
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.ops import reference
from rana_kernels.ops.mlp import combine


class RanaSplitMLP(nn.Module):
    """A RanaMLP whose adapters are separate modules with the names of the linears (`names`: up, gate, down).

    It computes the same as the RanaMLP, except that values between the layers are rounded once more. `joint`
    says whether up and gate share their ranks or their mask.
    """

    def __init__(self, names: tuple[str, str, str], activation: str, gated: bool, joint: bool) -> None:
        super().__init__()
        self.names, self.activation, self.gated, self.joint = names, activation, gated, joint

    def forward(self, x: Tensor) -> Tensor:
        up_name, gate_name, down_name = self.names
        act = partial(reference.activate, activation=self.activation)
        if not self.gated:
            up, gate = getattr(self, up_name)(x), None
        elif up_name == gate_name:
            gate, up = getattr(self, up_name)(x).chunk(2, dim=-1)
        else:
            # Gate runs first, because a joint adapter of gate computes the output of up as well.
            gate, up = getattr(self, gate_name)(x), getattr(self, up_name)(x)
        return getattr(self, down_name)(combine(up, gate, act))


@torch.no_grad()
def split_mlp(mlp: RanaMLP) -> RanaSplitMLP:
    """Split a RanaMLP into one module for each linear. The parts share memory with the MLP where possible.

    Gate and up that share ranks or a mask become one joint adapter. If they are quantised, they become two
    adapters that hold the same ranks or norms, because a group of columns must not belong to both.
    """
    up, gate, down = mlp.names
    a, gated = mlp.op_arguments(), mlp.gate_rank is not None
    stacked = a.B is not None and a.gate_rows is not None and len(a.B) == len(a.up_rows) + len(a.gate_rows)
    split = RanaSplitMLP(mlp.names, mlp.activation, gated, gated and not stacked)
    ranks = {gate: slice(len(a.up_rows), None), up: slice(len(a.up_rows))} if stacked else {}
    quantized = a.up_scale is not None or a.gate_scale is not None
    if a.gate_rows is None or up == gate or stacked or quantized:
        for name in (gate, up) if gated and up != gate else (up,):
            split.add_module(name, _part(mlp, ranks.get(name, slice(None)), getattr(mlp, name)))
    else:
        both = None if a.up_bias is None or a.gate_bias is None else torch.cat([a.gate_bias, a.up_bias])
        widths = (a.gate_rows.shape[1], a.up_rows.shape[1])
        rows = {"rows": torch.cat([a.gate_rows, a.up_rows], 1), "bias": both}
        owner, receiver = _parts(mlp, slice(None), rows, widths)
        split.add_module(gate, owner)
        split.add_module(up, fill_module(receiver))
    linear = getattr(mlp, down)
    last = RanaNeuronLinear(
        linear.in_features, linear.out_features, a.down_bias is not None, device="meta",
        dtype=linear.weight.dtype,
    )  # fmt: skip
    fill_module(last, **_tensors(linear, "rows", "rows_scale", "norms", "threshold", "bias"))
    split.add_module(down, last)
    return split.train(mlp.training)


def _part(mlp: RanaMLP, ranks: slice, linear: AdaptedLinear) -> AdaptedLinear:
    """Return the adapter of one linear with these ranks (or all neurons) of the MLP."""
    rows = _tensors(linear, "rows", "rows_scale", "bias")
    return _parts(mlp, ranks, rows, (linear.out_features,))[0]


def _parts(
    mlp: RanaMLP, ranks: slice, rows: dict[str, Tensor | None], widths: tuple[int, ...]
) -> list[AdaptedLinear]:
    """Return the adapter of linears with these widths, and the receivers, which are still empty."""
    own = {n: t if t is None else t[ranks] for n, t in _tensors(mlp, "B", "B_scale", "threshold").items()}
    rank, linear = None if mlp.B is None else len(mlp.threshold[ranks]), getattr(mlp, mlp.names[0])
    bias, dtype = rows["bias"] is not None, linear.weight.dtype
    made = joint_linears(linear.in_features, widths, rank, bias, device="meta", dtype=dtype)
    fill_module(made[0], **own, **rows, norms=mlp.norms)
    return made


def _tensors(module: nn.Module, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


@torch.no_grad()
def join_mlp(split: RanaSplitMLP) -> RanaMLP:
    """Build one RanaMLP from the parts. They may have more ranks than before the split."""
    up, gate, down = split.names
    last = getattr(split, down)
    # With one mask or joint ranks the part that runs first holds the ranks or norms of both.
    first = getattr(split, gate if split.gated else up)
    parts = [first] if split.joint or not split.gated else [getattr(split, up), first]
    neurons = isinstance(first, RanaNeuronLinear)
    R = parts[0].rows.shape[0]
    gate_rank = None if not split.gated else R if split.joint else first.rows.shape[0]
    names = (up, gate) if split.gated else (up,)
    if first.handoff is not None:
        rows = [part.contiguous() for part in first.rows.split(first.widths, 1)]
        vectors = [None, None] if first.bias is None else first.bias.split(first.widths)
        halves = zip((gate, up), rows, vectors, strict=True)
        expanding = {name: {"rows": part, "bias": bias} for name, part, bias in halves}
    else:
        expanding = {name: _tensors(getattr(split, name), "rows", "rows_scale", "bias") for name in names}
    up_bias, gate_bias = (name in expanding and expanding[name]["bias"] is not None for name in (up, gate))
    mlp = RanaMLP(
        first.in_features, last.in_features, last.out_features, R, gate_rank, split.activation,
        kind="neuron" if neurons else "rank", joint=split.joint,
        bias=(up_bias, gate_bias, last.bias is not None), names=split.names, device="meta",
        dtype=first.weight.dtype,
    )  # fmt: skip
    tensors: dict[str, Any] = {"threshold": torch.cat([p.threshold for p in parts])}
    if neurons:
        tensors["norms"] = first.norms
    else:
        tensors["B"] = torch.cat([part.B for part in parts])
        if first.B_scale is not None:
            tensors["B_scale"] = torch.cat([part.B_scale for part in parts])
    expanding[down] = _tensors(last, "rows", "rows_scale", "norms", "threshold", "bias")
    for name, own in expanding.items():
        tensors |= {f"{name}.{tensor}": value for tensor, value in own.items()}
    fill_module(mlp, **tensors)
    return mlp.train(split.training)
