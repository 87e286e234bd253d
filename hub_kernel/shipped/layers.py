"""Layers whose `forward` the kernels library can put in place of a module's own.

The tensors are those of the module. RanaLinear, RanaNeuronLinear and RanaMLP are for the modules of these
names in the Python package rana_kernels, and QuantizedLinear too. Linear is for any `torch.nn.Linear`.
"""

from __future__ import annotations

from torch import Tensor, nn

from .functions import linear, masked_linear, masked_lowrank_linear, masked_mlp


class Linear(nn.Module):
    """`y = x @ weight.T + bias`, which for a few tokens reads the weight at memory speed."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """The same with a weight of 8 or 4 bits."""

    has_backward = True
    can_torch_compile = True

    qweight: Tensor
    qweight_scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.qweight, self.bias, self.qweight_scale)


class RanaLinear(nn.Module):
    """A rank adapter, of one linear or of several that read one input."""

    has_backward = True
    can_torch_compile = True

    B: Tensor
    rows: Tensor
    threshold: Tensor
    bias: Tensor | None
    B_scale: Tensor | None
    rows_scale: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = masked_lowrank_linear(
            x, self.B, self.rows, self.threshold, self.bias, self.B_scale, self.rows_scale
        )
        return self.hand_over(x, y)


class RanaNeuronLinear(nn.Module):
    """A neuron adapter, of one linear or of several that read one input."""

    has_backward = True
    can_torch_compile = True

    rows: Tensor
    threshold: Tensor
    norms: Tensor
    bias: Tensor | None
    rows_scale: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = masked_linear(x, self.rows, self.threshold, self.norms, self.bias, self.rows_scale)
        return self.hand_over(x, y)


class RanaMLP(nn.Module):
    """A whole MLP in one op."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return masked_mlp(x, *self.op_arguments())
