"""A RanaMLP split into one module for each linear, for code that works on single linears."""

from functools import partial

import torch
from torch import Tensor, nn

from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear, joint_linears
from rana_kernels.nn.base import fill_module, require_floats
from rana_kernels.nn.mlp import RanaMLP
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
            # Gate runs first, because with joint ranks gate computes the output of up as well.
            gate, up = getattr(self, gate_name)(x), getattr(self, up_name)(x)
        return getattr(self, down_name)(combine(up, gate, act))


@torch.no_grad()
def split_mlp(mlp: RanaMLP) -> RanaSplitMLP:
    """Split a RanaMLP into one module for each linear. The parts share memory with the MLP where possible.

    Raises ValueError if its weights are quantised.
    """
    require_floats(mlp)
    up, gate, down = mlp.names
    B, up_rows, gate_rows, threshold, _, up_bias, gate_bias, rows, norms, down_threshold, bias = (
        mlp.op_arguments()[:11]
    )
    split = RanaSplitMLP(mlp.names, mlp.activation, gate_rows is not None)
    R = up_rows.shape[0]
    if gate_rows is None:
        split.add_module(up, _linear(B, up_rows, threshold, up_bias))
    elif up == gate:
        split.add_module(up, _linear(B, getattr(mlp, up).rows, threshold, getattr(mlp, up).bias))
    elif B.shape[0] == R + gate_rows.shape[0]:
        split.add_module(gate, _linear(B[R:], gate_rows, threshold[R:], gate_bias))
        split.add_module(up, _linear(B[:R], up_rows, threshold[:R], up_bias))
    else:
        widths = (gate_rows.shape[1], up_rows.shape[1])
        owner, receiver = joint_linears(
            B.shape[1], widths, R, up_bias is not None, device="meta", dtype=B.dtype
        )
        both = None if up_bias is None or gate_bias is None else torch.cat([gate_bias, up_bias])
        fill_module(owner, B=B, rows=torch.cat([gate_rows, up_rows], 1), threshold=threshold, bias=both)
        split.add_module(gate, owner)
        split.add_module(up, fill_module(receiver))
    last = RanaNeuronLinear(rows.shape[0], rows.shape[1], bias is not None, device="meta")
    split.add_module(down, fill_module(last, rows=rows, norms=norms, threshold=down_threshold, bias=bias))
    return split.train(mlp.training)


@torch.no_grad()
def join_mlp(split: RanaSplitMLP) -> RanaMLP:
    """Build one RanaMLP from the parts. They may have more ranks than before the split."""
    up, gate, down = split.names
    last = getattr(split, down)
    # With joint ranks the part that runs first holds the ranks of both.
    first = getattr(split, gate if split.gated else up)
    joint = split.gated and (up == gate or first.handoff is not None)
    parts = [first] if joint or not split.gated else [getattr(split, up), first]
    R = parts[0].B.shape[0]
    gate_rank = None if not split.gated else R if joint else first.B.shape[0]
    bias = first.bias is not None if joint else parts[0].bias is not None
    biases = (bias, split.gated and first.bias is not None, last.bias is not None)
    mlp = RanaMLP(
        first.in_features, last.in_features, last.out_features, R, gate_rank, split.activation,
        joint=joint, bias=biases, names=split.names, device="meta",
    )  # fmt: skip
    tensors = {
        "B": torch.cat([part.B for part in parts]),
        "threshold": torch.cat([p.threshold for p in parts]),
    }
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


def _linear(B: Tensor, rows: Tensor, threshold: Tensor, bias: Tensor | None) -> RanaLinear:
    made = RanaLinear(B.shape[1], rows.shape[1], B.shape[0], bias is not None, device="meta")
    fill_module(made, B=B, rows=rows, threshold=threshold, bias=bias)
    return made
