"""The module of a whole MLP: adapters of up and gate, an activation, and a neuron adapter, in one op."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.nn.base import AdaptedLinear, AdapterModule, wide_product, wide_weight
from rana_kernels.nn.format import FLOAT, Format
from rana_kernels.ops import reference
from rana_kernels.ops.checks import ACTIVATIONS, widen
from rana_kernels.ops.mlp import combine, gate_ranks
from rana_kernels.ops.quantized import columns_of


class _Rows(AdaptedLinear):
    """The part of a RanaMLP that has the name of the up or the gate linear.

    The MLP gets the tensors of this module only by calling it. Hooks that bring weights to the device when
    a module is called (offloading, sharding) therefore work as they do for any other layer.
    """

    def __init__(self, in_features, out_features, rank, bias, packed, format, device, dtype) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.packed = packed
        self.register_matrix("rows", rank, out_features, format, device, dtype)

    def register_matrix(self, name, rows, columns, format, device, dtype) -> None:
        if self.packed and not format.splits_at(columns // 2):
            raise ValueError(
                f"RanaMLP: {name} of gate and up are split at column {columns // 2}, wanted a multiple of "
                f"the group ({format.group}), and in 4 bits of 32"
            )
        super().register_matrix(name, rows, columns, format, device, dtype)

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.rows, self.rows_scale, self.bias


class _NeuronRows(AdaptedLinear):
    """The part of a RanaMLP that has the name of the down linear: its rows, norms and thresholds."""

    norms: Tensor

    def __init__(self, in_features, out_features, bias, format, device, dtype) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.register_matrix("rows", in_features, out_features, format.for_rows(out_features), device, dtype)
        self.register_float32("norms", in_features, device)
        self.register_float32("threshold", in_features, device)

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        return self.rows, self.rows_scale, self.norms, self.threshold, self.bias


class MLPArguments(NamedTuple):
    """The arguments of `masked_mlp` after x, in the order of its schema."""

    B: Tensor | None
    up_rows: Tensor
    gate_rows: Tensor | None
    threshold: Tensor
    norms: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_rows: Tensor
    down_norms: Tensor
    down_threshold: Tensor
    down_bias: Tensor | None
    activation: str
    B_scale: Tensor | None
    up_scale: Tensor | None
    gate_scale: Tensor | None
    down_scale: Tensor | None


class RanaMLP(AdapterModule):
    """A whole MLP in one op: rank or neuron adapters for up and gate, a neuron adapter for down.

    kind="rank"     B [S, K] and threshold [S] stack the ranks of up over the ranks of gate. If `joint`, up
                    and gate read the same S ranks
    kind="neuron"   there is no B: threshold [K] and norms [K] give one mask on the input, for up and gate.
                    Their ranks are `in_features`, and `joint` is True if there is a gate

    The children keep the names of the linears (`names`: up, gate, down) and hold `rows`, `bias` and, for
    down, `norms` and `threshold`. An ungated MLP has `gate_rank=None`. If one linear computed both up and
    gate (gate's outputs first), both have its name, and `joint` is True.
    `format` is that of B and of the rows of up and gate (rows of ranks have 8 bits instead of 4),
    `down_format` that of down.
    Raises ValueError for an unknown activation, joint ranks that differ, neuron adapters with ranks or masks
    of their own, or a format that cannot be split between gate and up where one linear computed both.
    """

    B: Tensor | None
    B_scale: Tensor | None
    norms: Tensor | None

    def __init__(
        self,
        in_features: int,
        neurons: int,
        out_features: int,
        up_rank: int,
        gate_rank: int | None,
        activation: str,
        *,
        kind: str = "rank",
        joint: bool = False,
        bias: tuple[bool, bool, bool] = (False, False, False),
        names: tuple[str, str, str] = ("up_proj", "gate_proj", "down_proj"),
        format: Format = FLOAT,
        down_format: Format = FLOAT,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"RanaMLP: activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if joint and up_rank != gate_rank:
            raise ValueError(f"RanaMLP: joint ranks are {up_rank} and {gate_rank}, wanted the same number")
        if kind not in ("rank", "neuron"):
            raise ValueError(f"RanaMLP: kind is {kind!r}, wanted rank or neuron")
        fits = up_rank == in_features and gate_rank == (in_features if joint else None)
        if kind == "neuron" and not fits:
            raise ValueError(
                f"RanaMLP: neuron adapters have {up_rank} and {gate_rank} rows and joint={joint}, wanted "
                f"{in_features}, their in_features, and joint=True with a gate: they have one mask"
            )
        self.activation, self.names = activation, names
        self.gate_rank, packed = gate_rank, gate_rank is not None and names[0] == names[1]
        place = {"device": device, "dtype": dtype}
        stacked = up_rank if joint else up_rank + (gate_rank or 0)
        if kind == "rank":
            self.register_matrix("B", stacked, in_features, format, device, dtype)
            self.norms = None
        else:
            self.B = self.B_scale = None
            self.register_float32("norms", stacked, device)
        self.register_float32("threshold", stacked, device)
        up, gate, down = names
        width = neurons * (1 + packed)
        rows = format.for_ranks if kind == "rank" else format.for_rows(width)
        self.add_module(up, _Rows(in_features, width, up_rank, bias[0], packed, rows, **place))
        if gate_rank is not None and not packed:
            self.add_module(gate, _Rows(in_features, neurons, gate_rank, bias[1], False, rows, **place))
        self.add_module(down, _NeuronRows(neurons, out_features, bias[2], down_format, **place))

    def op_arguments(self) -> MLPArguments:
        """Return the arguments of `masked_mlp` after x."""
        up, gate, down = self.names
        up_rows, up_scale, up_bias = getattr(self, up)()
        if self.gate_rank is None:
            gate_rows = gate_scale = gate_bias = None
        elif gate == up:
            gate_rows, up_rows = up_rows.chunk(2, dim=1)
            gate_scale, up_scale = halves_of_scale(up_scale)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        else:
            gate_rows, gate_scale, gate_bias = getattr(self, gate)()
        rows, down_scale, norms, threshold, down_bias = getattr(self, down)()
        return MLPArguments(
            self.B, up_rows, gate_rows, self.threshold, self.norms, up_bias, gate_bias, rows, norms,
            threshold, down_bias, self.activation, self.B_scale, up_scale, gate_scale, down_scale,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_mlp(x, *self.op_arguments())

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the masks that `forward` applies, by child: [..., R] for up and gate, [..., I] for down.

        R is K for neuron adapters.
        """
        a = self.op_arguments()
        h = widen(x) if a.B is None else wide_product(x, a.B, a.B_scale)
        mask = reference.keep(h, a.threshold, a.norms)
        z = torch.where(mask, h, 0)

        def expand(part: slice, rows: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
            y = z[..., part] @ wide_weight(rows, scale, columns_of(rows), x.dtype)
            return y if bias is None else y + bias.to(y.dtype)

        first, up_name = slice(0, a.up_rows.shape[0]), self.names[0]
        masks, up, gate = {up_name: mask[..., first]}, expand(first, a.up_rows, a.up_scale, a.up_bias), None
        if a.gate_rows is not None:
            last = gate_ranks(h.shape[-1], a.gate_rows.shape[0])
            masks[self.names[1]] = mask[..., last]
            gate = expand(last, a.gate_rows, a.gate_scale, a.gate_bias)
        g = combine(up, gate, partial(reference.activate, activation=self.activation))
        return {**masks, self.names[2]: reference.keep(g, a.down_threshold, a.down_norms)}


def halves_of_scale(scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the scales of the first and the last half of the columns. Steps of whole rows serve both."""
    if scale is None or scale.shape[1] == 1:
        return scale, scale
    first, last = scale.chunk(2, dim=1)
    return first, last
