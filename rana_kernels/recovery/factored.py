"""Adapters as pairs of plain linears with the mask between, for what trains or rewrites linears.

A rank adapter is `B` (K → R) and `rows` (R → N), a neuron adapter its `rows` (K → N). LoRA on these is merged
into them, so what comes back has the sizes, the cost and the format that it had.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.backends import reference
from rana_kernels.checks import wide_dtype
from rana_kernels.modules import RanaLinear, RanaMLP, RanaNeuronLinear
from rana_kernels.recovery.split_mlp import RanaSplitMLP, put_together, take_apart


class FactoredLinear(nn.Module):
    """What a RanaLinear computes, with the rank values rounded to the input's dtype."""

    def __init__(self, adapter: RanaLinear) -> None:
        super().__init__()
        self.B = _linear(adapter.B, None)
        self.rows = _linear(adapter.rows.T, adapter.bias)
        self.register_buffer("threshold", adapter.threshold)
        self.widths, self.handoff = adapter.widths, adapter.handoff

    threshold: Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = self.B(x)
        y = self.rows(torch.where(reference.keep(_wide(h), self.threshold), h, 0))
        if self.handoff is None:
            return y
        own, *rest = y.split(self.widths, dim=-1)
        self.handoff.give(x, dict(enumerate(rest)))
        return own

    def scores(self, x: Tensor) -> Tensor:
        """|h| [..., R], what the thresholds are compared with."""
        return _wide(self.B(x)).abs()

    def closed(self) -> RanaLinear:
        first, *others = self.widths
        made = RanaLinear(
            self.B.in_features, first, self.B.out_features, self.rows.bias is not None,
            others=tuple(others), handoff=self.handoff, device="meta",
        )  # fmt: skip
        return _fill(made, self.rows, threshold=self.threshold, B=self.B.weight)


class FactoredNeurons(nn.Module):
    """What a RanaNeuronLinear computes. The scale stays what it was, whatever becomes of the rows."""

    def __init__(self, adapter: RanaNeuronLinear) -> None:
        super().__init__()
        self.rows = _linear(adapter.rows.T, adapter.bias)
        self.register_buffer("threshold", adapter.threshold)
        self.register_buffer("scale", adapter.scale)

    threshold: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(torch.where(reference.keep(_wide(x), self.threshold, self.scale), x, 0))

    def scores(self, x: Tensor) -> Tensor:
        """|x|·scale [..., K]."""
        return _wide(x).abs() * self.scale

    def closed(self) -> RanaNeuronLinear:
        sizes = self.rows.in_features, self.rows.out_features
        made = RanaNeuronLinear(*sizes, self.rows.bias is not None, device="meta")
        return _fill(made, self.rows, threshold=self.threshold, scale=self.scale)


Factored = FactoredLinear | FactoredNeurons


def factor(model: nn.Module) -> None:
    """Put factored modules in the place of the adapters of `model`; they share their memory."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaMLP):
            model.set_submodule(name, take_apart(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaLinear):
            model.set_submodule(name, FactoredLinear(module))
        elif isinstance(module, RanaNeuronLinear):
            model.set_submodule(name, FactoredNeurons(module))


def close(model: nn.Module) -> None:
    """Undo `factor`, with the weights as they are now."""
    for name, module in list(factored(model)):
        model.set_submodule(name, module.closed().train(module.training))
    for name, split in list(model.named_modules()):
        if isinstance(split, RanaSplitMLP):
            model.set_submodule(name, put_together(split))


def factored(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    """The factored modules, by the name of their (first) linear."""
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            yield name, module


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach())
    if bias is not None:
        made.bias = bias
    return made


def _fill(made: Any, rows: nn.Linear, **tensors: Tensor) -> Any:
    """Give an empty adapter its tensors, and an empty `weight` beside them."""
    made.weight = rows.weight.new_empty(0)
    made.rows = nn.Parameter(rows.weight.detach().T.contiguous())
    made.bias = rows.bias
    for name, tensor in tensors.items():
        is_parameter = name in made._parameters
        setattr(made, name, nn.Parameter(tensor.detach()) if is_parameter else tensor)
    return made
