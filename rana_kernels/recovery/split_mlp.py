"""A RanaMLP taken apart, for what works on one linear at a time, and put together again."""

import torch
from torch import Tensor, nn

from rana_kernels.backends import reference
from rana_kernels.modules import RanaLinear, RanaMLP, RanaNeuronLinear, joint_linears


class RanaSplitMLP(nn.Module):
    """The adapters of a RanaMLP as modules of their own, under the names that the linears had.

    Computes what the RanaMLP did, with a rounding more between the layers. `names`: up, gate, down.
    """

    def __init__(self, names: tuple[str, str, str], activation: str, gated: bool) -> None:
        super().__init__()
        self.names, self.activation, self.gated = names, activation, gated

    def forward(self, x: Tensor) -> Tensor:
        up, gate, down = self.names
        if not self.gated:
            z = reference.activate(getattr(self, up)(x), self.activation)
        elif up == gate:
            first, second = getattr(self, up)(x).chunk(2, dim=-1)
            z = reference.activate(first, self.activation) * second
        else:  # gate first: it computes for both where they share their ranks
            z = reference.activate(getattr(self, gate)(x), self.activation)
            z = z * getattr(self, up)(x)
        return getattr(self, down)(z)


@torch.no_grad()
def take_apart(mlp: RanaMLP) -> RanaSplitMLP:
    """The same MLP in parts, which share its memory where they can."""
    up, gate, down = mlp.names
    B, up_rows, gate_rows, threshold, up_bias, gate_bias, rows, scale, down_threshold, bias = mlp._weights()
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
        owner, receiver = joint_linears(B.shape[1], widths, R, up_bias is not None, device="meta")
        both = None if up_bias is None else torch.cat([gate_bias, up_bias])
        _fill(owner, B=B, rows=torch.cat([gate_rows, up_rows], 1), threshold=threshold, bias=both)
        _fill(receiver)
        split.add_module(gate, owner)
        split.add_module(up, receiver)
    last = RanaNeuronLinear(rows.shape[0], rows.shape[1], bias is not None, device="meta")
    split.add_module(down, _fill(last, rows=rows, scale=scale, threshold=down_threshold, bias=bias))
    return split.train(mlp.training)


@torch.no_grad()
def put_together(split: RanaSplitMLP) -> RanaMLP:
    """One RanaMLP again; the parts may have grown ranks."""
    up, gate, down = split.names
    last = getattr(split, down)
    # where gate and up share their ranks, the first of them has those of both
    first = getattr(split, gate if split.gated else up)
    shared = split.gated and (up == gate or first.handoff is not None)
    parts = [first] if shared or not split.gated else [getattr(split, up), first]
    R = parts[0].B.shape[0]
    gate_rank = None if not split.gated else R if shared else first.B.shape[0]
    bias = first.bias is not None if shared else parts[0].bias is not None
    biases = (bias, split.gated and first.bias is not None, last.bias is not None)
    mlp = RanaMLP(
        first.in_features, last.in_features, last.out_features, R, gate_rank, split.activation,
        joint=shared, bias=biases, names=split.names, device="meta",
    )  # fmt: skip
    mlp.B = nn.Parameter(torch.cat([part.B for part in parts]))
    mlp.threshold = torch.cat([part.threshold for part in parts])
    if shared and up != gate:
        rows, vectors = first.rows.split(first.widths, 1), [None, None]
        if first.bias is not None:
            vectors = list(first.bias.split(first.widths))
        _fill(getattr(mlp, gate), rows=rows[0].contiguous(), bias=vectors[0])
        _fill(getattr(mlp, up), rows=rows[1].contiguous(), bias=vectors[1])
    else:
        for name in dict.fromkeys((up, gate) if split.gated else (up,)):
            _fill(getattr(mlp, name), rows=getattr(split, name).rows, bias=getattr(split, name).bias)
    _fill(getattr(mlp, down), rows=last.rows, scale=last.scale, threshold=last.threshold, bias=last.bias)
    return mlp.train(split.training)


def _linear(B: Tensor, rows: Tensor, threshold: Tensor, bias: Tensor | None) -> RanaLinear:
    made = RanaLinear(B.shape[1], rows.shape[1], B.shape[0], bias is not None, device="meta")
    _fill(made, B=B, rows=rows, threshold=threshold, bias=bias)
    return made


def _fill(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """Give an empty module its tensors, and an empty `weight` beside them."""
    like = next((t for t in tensors.values() if t is not None and t.is_floating_point()), torch.empty(0))
    module.weight = like.new_empty(0)
    for name, tensor in tensors.items():
        if tensor is not None:
            is_parameter = name in module._parameters
            setattr(module, name, nn.Parameter(tensor.detach()) if is_parameter else tensor.detach())
    return module
