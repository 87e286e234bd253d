"""Linears that stay dense beside adapters: lm_head, and the linears that a plan does not change."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.nn.base import AdaptedLinear
from rana_kernels.nn.format import Format


class DenseLinear(nn.Linear):
    """An `nn.Linear` that calls `rana::linear`: faster for a few tokens, with the same bits every time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.linear(x, self.weight, self.bias)


class QuantizedLinear(AdaptedLinear):
    """A dense linear with its weight in 8 or 4 bits, which calls `rana::linear`.

    qweight [N, K] int8 or [N, ⌈K/2⌉] uint8 · qweight_scale [N, groups] float16 · bias [N].
    """

    qweight: Tensor
    qweight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, format: Format, *, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.register_matrix("qweight", out_features, in_features, format, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.linear(x, self.qweight, self.bias, self.qweight_scale)


def serve_dense(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each plain `nn.Linear` among these modules by a DenseLinear. Leave the other modules, and
    linears whose `forward` was replaced (accelerate does it, to move tensors).

    The new module has the same parameters, not copies, so tied weights stay tied.
    """
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is nn.Linear and "forward" not in vars(linear):
            model.set_submodule(name, _dense_linear(linear))


def _dense_linear(linear: nn.Linear) -> DenseLinear:
    made = DenseLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)
