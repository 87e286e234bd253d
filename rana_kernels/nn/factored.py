"""Adapters as pairs of plain linears with the mask between, for what trains or rewrites linears.

A rank adapter is `B` (K → R) and `rows` (R → N), a neuron adapter its `rows` (K → N). LoRA on these is merged
into them, so what comes back has the sizes, the cost and the format that it had.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rana_kernels.nn.adapters import RanaLinear, RanaMLP, RanaNeuronLinear, fill_module
from rana_kernels.nn.split_mlp import RanaSplitMLP, join_mlp, split_mlp
from rana_kernels.ops import reference
from rana_kernels.ops.checks import wide_dtype


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
        return y if self.handoff is None else self.handoff.share(x, y.split(self.widths, dim=-1))

    def scores(self, x: Tensor) -> Tensor:
        """|h| [..., R], what the thresholds are compared with."""
        return _wide(self.B(x)).abs()

    def to_adapter(self) -> RanaLinear:
        first, *others = self.widths
        made = RanaLinear(
            self.B.in_features, first, self.B.out_features, self.rows.bias is not None,
            others=tuple(others), handoff=self.handoff, device="meta",
        )  # fmt: skip
        fill_module(made, B=self.B.weight, threshold=self.threshold, **_rows(self.rows))
        return made


class FactoredNeurons(nn.Module):
    """What a RanaNeuronLinear computes. The norms stay as they were when the rows change."""

    def __init__(self, adapter: RanaNeuronLinear) -> None:
        super().__init__()
        self.rows = _linear(adapter.rows.T, adapter.bias)
        self.register_buffer("threshold", adapter.threshold)
        self.register_buffer("norms", adapter.norms)

    threshold: Tensor
    norms: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(torch.where(reference.keep(_wide(x), self.threshold, self.norms), x, 0))

    def scores(self, x: Tensor) -> Tensor:
        """|x|·norms [..., K]."""
        return _wide(x).abs() * self.norms

    def to_adapter(self) -> RanaNeuronLinear:
        sizes = self.rows.in_features, self.rows.out_features
        made = RanaNeuronLinear(*sizes, self.rows.bias is not None, device="meta")
        fill_module(made, threshold=self.threshold, norms=self.norms, **_rows(self.rows))
        return made


Factored = FactoredLinear | FactoredNeurons


def to_linears(model: nn.Module) -> None:
    """Put factored modules in the place of the adapters of `model`; they share their memory."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaMLP):
            model.set_submodule(name, split_mlp(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaLinear):
            model.set_submodule(name, FactoredLinear(module))
        elif isinstance(module, RanaNeuronLinear):
            model.set_submodule(name, FactoredNeurons(module))


def from_linears(model: nn.Module) -> None:
    """Undo `factor`, with the weights as they are now."""
    for name, module in list(factored(model)):
        model.set_submodule(name, module.to_adapter().train(module.training))
    for name, split in list(model.named_modules()):
        if isinstance(split, RanaSplitMLP):
            model.set_submodule(name, join_mlp(split))


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


def _rows(linear: nn.Linear) -> dict[str, Tensor | None]:
    """Return `rows` and `bias` of the adapter whose last factor `linear` is."""
    return {"rows": linear.weight.detach().T.contiguous(), "bias": linear.bias}
