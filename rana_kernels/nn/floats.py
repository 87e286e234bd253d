"""Quantised modules with float weights again, for code that trains them. The rounding errors stay."""

from collections.abc import Iterable

import torch
from torch import nn

from rana_kernels.nn.base import AdapterModule
from rana_kernels.nn.dense import DenseLinear, QuantizedLinear
from rana_kernels.nn.format import FLOAT
from rana_kernels.ops.quantized import dequantize


@torch.no_grad()
def to_floats(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Give these modules, and all modules in them, weights in floats of this dtype.

    A QuantizedLinear becomes a DenseLinear, and an adapter keeps its module.
    """
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, _dense(module, dtype))
            continue
        for part in module.modules():
            if isinstance(part, AdapterModule):
                _widen_matrices(part, dtype)


def _widen_matrices(module: AdapterModule, dtype: torch.dtype) -> None:
    for name, columns in list(module.matrices.items()):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale")
        if scale is not None:
            module.register_matrix(name, len(weight), columns, FLOAT, "meta", dtype)
            setattr(module, name, nn.Parameter(dequantize(weight, scale, columns, dtype)))


def _dense(linear: QuantizedLinear, dtype: torch.dtype) -> DenseLinear:
    made = DenseLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    weight = dequantize(linear.qweight, linear.qweight_scale, linear.in_features, dtype)
    made.weight = nn.Parameter(weight)
    made.register_parameter("bias", linear.bias)
    return made.train(linear.training)
