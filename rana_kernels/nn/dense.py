"""Linears that stay dense beside adapters: lm_head, and what a plan leaves as it is."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)


class DenseLinear(nn.Linear):
    """An `nn.Linear` whose product is `rana::linear`: faster for a few tokens, the same bits every time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.linear(x, self.weight, self.bias)


def serve_dense(model: nn.Module, names: Iterable[str]) -> None:
    """Put a DenseLinear in place of each plain `nn.Linear` among these modules, and leave the others.

    It has the same parameters, not copies: weights that are tied stay so.
    """
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is nn.Linear:
            model.set_submodule(name, _served(linear))


def _served(linear: nn.Linear) -> DenseLinear:
    made = DenseLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)
