"""A RanaMLP split into one module for each linear, for code that works on single linears."""

from functools import partial

import torch
from torch import Tensor, nn

from rana_kernels.nn.adapters import RanaNeuronLinear, joint_linears
from rana_kernels.nn.base import AdaptedLinear, fill_module, require_floats
from rana_kernels.nn.mlp import MLPArguments, RanaMLP
from rana_kernels.ops import reference
from rana_kernels.ops.mlp import combine


class RanaSplitMLP(nn.Module):
    """A RanaMLP whose adapters are separate modules with the names of the linears (`names`: up, gate, down).

    It computes the same as the RanaMLP, except that values between the layers are rounded once more.
    """

    def __init__(self, names: tuple[str, str, str], activation: str, gated: bool) -> None:
        super().__init__()
        self.names, self.activation, self.gated = names, activation, gated

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

    Raises ValueError if its weights are quantised.
    """
    require_floats(mlp)
    up, gate, down = mlp.names
    a = mlp.op_arguments()
    split = RanaSplitMLP(mlp.names, mlp.activation, a.gate_rows is not None)
    if a.gate_rows is None or up == gate:
        linear = getattr(mlp, up)
        split.add_module(up, _part(a, slice(None), linear.rows, linear.bias))
    elif a.B is not None and len(a.B) == len(a.up_rows) + len(a.gate_rows):
        R = len(a.up_rows)
        split.add_module(gate, _part(a, slice(R, None), a.gate_rows, a.gate_bias))
        split.add_module(up, _part(a, slice(R), a.up_rows, a.up_bias))
    else:
        both = None if a.up_bias is None or a.gate_bias is None else torch.cat([a.gate_bias, a.up_bias])
        widths = (a.gate_rows.shape[1], a.up_rows.shape[1])
        owner, receiver = _parts(a, slice(None), torch.cat([a.gate_rows, a.up_rows], 1), both, widths)
        split.add_module(gate, owner)
        split.add_module(up, fill_module(receiver))
    neurons, width = a.down_rows.shape
    last = RanaNeuronLinear(neurons, width, a.down_bias is not None, device="meta")
    fill_module(last, rows=a.down_rows, norms=a.down_norms, threshold=a.down_threshold, bias=a.down_bias)
    split.add_module(down, last)
    return split.train(mlp.training)


def _part(a: MLPArguments, ranks: slice, rows: Tensor, bias: Tensor | None) -> AdaptedLinear:
    """Return the adapter of one linear with these ranks (or all neurons) of the MLP."""
    return _parts(a, ranks, rows, bias, (rows.shape[1],))[0]


def _parts(
    a: MLPArguments, ranks: slice, rows: Tensor, bias: Tensor | None, widths: tuple[int, ...]
) -> list[AdaptedLinear]:
    """Return the adapter of linears with these widths, and the receivers, which are still empty."""
    B = None if a.B is None else a.B[ranks]
    K, rank = (len(rows), None) if B is None else (B.shape[1], len(B))
    made = joint_linears(K, widths, rank, bias is not None, device="meta", dtype=rows.dtype)
    fill_module(made[0], B=B, rows=rows, threshold=a.threshold[ranks], norms=a.norms, bias=bias)
    return made


@torch.no_grad()
def join_mlp(split: RanaSplitMLP) -> RanaMLP:
    """Build one RanaMLP from the parts. They may have more ranks than before the split."""
    up, gate, down = split.names
    last = getattr(split, down)
    # With one mask or joint ranks the part that runs first holds the rows of both.
    first = getattr(split, gate if split.gated else up)
    joint = split.gated and (up == gate or first.handoff is not None)
    parts = [first] if joint or not split.gated else [getattr(split, up), first]
    neurons = isinstance(first, RanaNeuronLinear)
    R = parts[0].rows.shape[0]
    gate_rank = None if not split.gated else R if joint else first.rows.shape[0]
    bias = first.bias is not None if joint else parts[0].bias is not None
    biases = (bias, split.gated and first.bias is not None, last.bias is not None)
    mlp = RanaMLP(
        first.in_features, last.in_features, last.out_features, R, gate_rank, split.activation,
        kind="neuron" if neurons else "rank", joint=joint, bias=biases, names=split.names, device="meta",
    )  # fmt: skip
    tensors = {"threshold": torch.cat([p.threshold for p in parts])}
    tensors |= {"norms": first.norms} if neurons else {"B": torch.cat([part.B for part in parts])}
    if joint and up != gate:
        rows = [part.contiguous() for part in first.rows.split(first.widths, 1)]
        vectors = [None, None] if first.bias is None else first.bias.split(first.widths)
        expanding = dict(zip((gate, up), zip(rows, vectors, strict=True), strict=True))
    else:
        names = (up, gate) if split.gated else (up,)
        expanding = {name: (getattr(split, name).rows, getattr(split, name).bias) for name in names}
    for name, (part_rows, part_bias) in expanding.items():
        tensors |= {f"{name}.rows": part_rows, f"{name}.bias": part_bias}
    tensors |= {f"{down}.{name}": getattr(last, name) for name in ("rows", "norms", "threshold", "bias")}
    fill_module(mlp, **tensors)
    return mlp.train(split.training)
