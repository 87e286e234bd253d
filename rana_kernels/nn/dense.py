"""Linears that stay dense beside adapters: lm_head, and the linears that a plan does not change."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)


class DenseLinear(nn.Linear):
    """An `nn.Linear` that calls `rana::linear`: faster for a few tokens, with the same bits every time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.linear(x, self.weight, self.bias)


def serve_dense(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each plain `nn.Linear` among these modules by a DenseLinear. Leave the other modules.

    The new module has the same parameters, not copies, so tied weights stay tied.
    """
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is nn.Linear:
            model.set_submodule(name, _dense_linear(linear))


def _dense_linear(linear: nn.Linear) -> DenseLinear:
    made = DenseLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)
