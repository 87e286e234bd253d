"""The module of a whole MLP: two rank adapters and a neuron adapter around an activation, in one op."""

from functools import partial

import torch
from torch import Tensor

from rana_kernels.nn.adapters import AdaptedLinear, AdapterModule, empty_parameter, wide_product
from rana_kernels.ops import reference
from rana_kernels.ops.checks import ACTIVATIONS, wide_dtype
from rana_kernels.ops.mlp import combine, gate_ranks


class _Rows(AdaptedLinear):
    """The part of a RanaMLP that has the name of the up or the gate linear.

    The MLP gets the tensors of this module only by calling it. Hooks that bring weights to the device when
    a module is called (offloading, sharding) therefore work as they do for any other layer.
    """

    def __init__(self, in_features, out_features, rank, bias, device, dtype) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.rows = empty_parameter(rank, out_features, device=device, dtype=dtype)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.rows, self.bias


class _NeuronRows(AdaptedLinear):
    """The part of a RanaMLP that has the name of the down linear: its rows, norms and thresholds."""

    norms: Tensor

    def __init__(self, in_features, out_features, bias, device, dtype) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.rows = empty_parameter(in_features, out_features, device=device, dtype=dtype)
        self.register_float32("norms", in_features, device)
        self.register_float32("threshold", in_features, device)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.rows, self.norms, self.threshold, self.bias


class RanaMLP(AdapterModule):
    """A whole MLP in one op: rank adapters for up and gate, a neuron adapter for down.

    B [S, K] and threshold [S] stack the ranks of up over the ranks of gate. If `joint`, up and gate read
    the same S ranks. The children keep the names of the linears (`names`: up, gate, down) and hold `rows`,
    `bias` and, for down, `norms` and `threshold`. An ungated MLP has `gate_rank=None`. If one linear
    computed both up and gate (gate's outputs first), both have its name, and `joint` is True.
    Raises ValueError for an unknown activation, or joint ranks that differ.
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        out_features: int,
        up_rank: int,
        gate_rank: int | None,
        activation: str,
        *,
        joint: bool = False,
        bias: tuple[bool, bool, bool] = (False, False, False),
        names: tuple[str, str, str] = ("up_proj", "gate_proj", "down_proj"),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"RanaMLP: activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if joint and up_rank != gate_rank:
            raise ValueError(f"RanaMLP: joint ranks are {up_rank} and {gate_rank}, wanted the same number")
        self.activation, self.names = activation, names
        self.gate_rank, packed = gate_rank, gate_rank is not None and names[0] == names[1]
        place = {"device": device, "dtype": dtype}
        stacked = up_rank if joint else up_rank + (gate_rank or 0)
        self.B = empty_parameter(stacked, in_features, **place)
        self.register_float32("threshold", stacked, device)
        up, gate, down = names
        self.add_module(up, _Rows(in_features, neurons * (1 + packed), up_rank, bias[0], **place))
        if gate_rank is not None and not packed:
            self.add_module(gate, _Rows(in_features, neurons, gate_rank, bias[1], **place))
        self.add_module(down, _NeuronRows(neurons, out_features, bias[2], **place))

    def op_arguments(self) -> tuple:
        """Return B and the tensors that follow B in the signature of `masked_mlp`."""
        up, gate, down = self.names
        up_rows, up_bias = getattr(self, up)()
        if self.gate_rank is None:
            gate_rows = gate_bias = None
        elif gate == up:
            gate_rows, up_rows = up_rows.chunk(2, dim=1)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        else:
            gate_rows, gate_bias = getattr(self, gate)()
        down_rows, norms, down_threshold, down_bias = getattr(self, down)()
        up_and_gate = (self.B, up_rows, gate_rows, self.threshold, up_bias, gate_bias)
        return *up_and_gate, down_rows, norms, down_threshold, down_bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_mlp(x, *self.op_arguments(), self.activation)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the masks that `forward` applies, by child: [..., R] for up and gate, [..., I] for down."""
        B, up_rows, gate_rows, threshold, up_bias, gate_bias, _, norms, down_threshold, _ = (
            self.op_arguments()
        )
        wide = wide_dtype(x.dtype)
        h = wide_product(x, B)
        mask = reference.keep(h, threshold)
        z = torch.where(mask, h, 0)

        def expand(part: slice, rows: Tensor, bias: Tensor | None) -> Tensor:
            y = z[..., part] @ rows.to(wide)
            return y if bias is None else y + bias.to(wide)

        first = slice(0, up_rows.shape[0])
        masks, up, gate = {self.names[0]: mask[..., first]}, expand(first, up_rows, up_bias), None
        if gate_rows is not None:
            last = gate_ranks(B.shape[0], gate_rows.shape[0])
            masks[self.names[1]] = mask[..., last]
            gate = expand(last, gate_rows, gate_bias)
        g = combine(up, gate, partial(reference.activate, activation=self.activation))
        return {**masks, self.names[2]: reference.keep(g, down_threshold, norms)}
