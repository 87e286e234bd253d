"""Adapters as plain linears with a mask, for code that trains or rewrites linears.

A rank adapter becomes two linears, `B` (K → R) and `rows` (R → N). A neuron adapter becomes one, `rows`
(K → N). LoRA on these linears is merged into them, so the adapter that is made from them afterwards has the
same sizes, cost and format as before.
"""

from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn

from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear
from rana_kernels.nn.base import AdapterModule, fill_module, require_floats
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.nn.split_mlp import RanaSplitMLP, join_mlp, split_mlp
from rana_kernels.ops import reference
from rana_kernels.ops.checks import widen


class FactoredLinear(nn.Module):
    """A RanaLinear as two plain linears. The rank values are rounded to the input's dtype."""

    def __init__(self, adapter: RanaLinear) -> None:
        super().__init__()
        require_floats(adapter)
        self.B = _linear(adapter.B, None)
        self.rows = _linear(adapter.rows.T, adapter.bias)
        self.register_buffer("threshold", adapter.threshold)
        self.widths, self.handoff = adapter.widths, adapter.handoff

    threshold: Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = self.B(x)
        y = self.rows(torch.where(reference.keep(widen(h), self.threshold), h, 0))
        return y if self.handoff is None else self.handoff.share(x, y.split(self.widths, dim=-1))

    def scores(self, x: Tensor) -> Tensor:
        """Return |h| [..., R], which the mask compares with the thresholds."""
        return widen(self.B(x)).abs()

    def to_adapter(self) -> RanaLinear:
        """Build the RanaLinear that computes the same, with the weights as they are now."""
        first, *others = self.widths
        made = RanaLinear(
            self.B.in_features, first, self.B.out_features, self.rows.bias is not None,
            others=tuple(others), handoff=self.handoff, device="meta",
        )  # fmt: skip
        fill_module(made, B=self.B.weight, threshold=self.threshold, **_rows(self.rows))
        return made


class FactoredNeurons(nn.Module):
    """A RanaNeuronLinear as one plain linear. When training changes the rows, the norms stay as they are."""

    def __init__(self, adapter: RanaNeuronLinear) -> None:
        super().__init__()
        require_floats(adapter)
        self.rows = _linear(adapter.rows.T, adapter.bias)
        self.register_buffer("threshold", adapter.threshold)
        self.register_buffer("norms", adapter.norms)
        self.widths, self.handoff = adapter.widths, adapter.handoff

    threshold: Tensor
    norms: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows(torch.where(reference.keep(widen(x), self.threshold, self.norms), x, 0))
        return y if self.handoff is None else self.handoff.share(x, y.split(self.widths, dim=-1))

    def scores(self, x: Tensor) -> Tensor:
        """Return |x|·norms [..., K], which the mask compares with the thresholds."""
        return widen(x).abs() * self.norms

    def to_adapter(self) -> RanaNeuronLinear:
        """Build the RanaNeuronLinear that computes the same, with the weights as they are now."""
        first, *others = self.widths
        made = RanaNeuronLinear(
            self.rows.in_features, first, self.rows.bias is not None,
            others=tuple(others), handoff=self.handoff, device="meta",
        )  # fmt: skip
        fill_module(made, threshold=self.threshold, norms=self.norms, **_rows(self.rows))
        return made


Factored = FactoredLinear | FactoredNeurons


def to_linears(model: nn.Module, skip: Container[str] = ()) -> None:
    """Replace the adapters of `model` by factored modules, which share memory with the adapters.

    skip   the full names of modules that stay as they are

    Raises ValueError for quantised adapters, before anything is replaced.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule) and name not in skip:
            require_floats(module)
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaMLP):
            model.set_submodule(name, split_mlp(module))
    for name, module in list(model.named_modules()):
        if name in skip:
            continue
        if isinstance(module, RanaLinear):
            model.set_submodule(name, FactoredLinear(module))
        elif isinstance(module, RanaNeuronLinear):
            model.set_submodule(name, FactoredNeurons(module))


def from_linears(model: nn.Module) -> None:
    """Undo `to_linears`, with the weights as they are now."""
    for name, module in list(factored(model)):
        model.set_submodule(name, module.to_adapter().train(module.training))
    for name, split in list(model.named_modules()):
        if isinstance(split, RanaSplitMLP):
            model.set_submodule(name, join_mlp(split))


def factored(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    """Yield the factored modules with their names. A joint module has the name of its first linear."""
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            yield name, module


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach())
    if bias is not None:
        made.bias = bias
    return made


def _rows(linear: nn.Linear) -> dict[str, Tensor | None]:
    """Return `rows` and `bias` of an adapter from the plain linear that holds both."""
    return {"rows": linear.weight.detach().T.contiguous(), "bias": linear.bias}
