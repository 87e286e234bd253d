"""The linear layers of a model, independent of how a library stores them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rana_kernels.nn.base import AdapterModule
from rana_kernels.nn.dense import DenseLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Linear:
    """The tensors of a linear layer: weight [N, K] · bias [N] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def is_linear(module: nn.Module) -> bool:
    """Say whether `module` computes what `nn.Linear` computes, and nothing else.

    Linears that quantise while they train, and others that only look like one, have a `forward` of their own.
    The hooks of accelerate have one too, which moves tensors and calls the linear's.
    """
    computes = type(module).forward in (nn.Linear.forward, DenseLinear.forward)
    return computes and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))


def kind_of(module: object) -> str:
    """Return what to call a module in an error: its class, and whether its `forward` was replaced."""
    replaced = " with another forward" if "forward" in getattr(module, "__dict__", {}) else ""
    return type(module).__name__ + replaced


def linear_of(model: nn.Module, name: str) -> Linear:
    """Return the linear `name` of `model`. Raise ValueError if it does not exist or is not a plain linear."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
    if type(module).__name__ == "Conv1D" and hasattr(
        module, "nf"
    ):  # of transformers, which stores W transposed
        weight: Tensor = module.weight  # type: ignore[assignment]
        return Linear(weight.T, module.bias)  # type: ignore[arg-type]
    if not is_linear(module):
        what = "an adapted" if isinstance(module, AdapterModule) else "a quantised or wrapped"
        raise ValueError(
            f"{name} is a {kind_of(module)}, wanted torch.nn.Linear: {what} model cannot be "
            "compressed again, start from the original"
        )
    dtype = getattr(getattr(module, "weight", None), "dtype", None)  # it may be packed under other names
    if dtype not in FLOATS:
        what = (
            "call model.float() first"
            if dtype == torch.float64
            else "a quantised model cannot be compressed, start from the original"
        )
        raise ValueError(f"{name} has a weight of {dtype}, wanted float32, bfloat16 or float16: {what}")
    return Linear(module.weight, module.bias)  # type: ignore[arg-type]
