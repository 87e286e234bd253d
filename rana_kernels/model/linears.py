"""The linear layers of a model, independent of how a library stores them."""

from dataclasses import dataclass

from torch import Tensor, nn

from rana_kernels.nn.base import AdapterModule


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
    if not isinstance(module, nn.Linear):
        what = "an adapted" if isinstance(module, AdapterModule) else "a quantised or wrapped"
        raise ValueError(
            f"{name} is a {type(module).__name__}, wanted torch.nn.Linear: {what} model cannot be "
            "compressed again, start from the original"
        )
    dtype = getattr(getattr(module, "weight", None), "dtype", None)  # it may be packed under other names
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"{name} has a weight of {dtype}, wanted float32, bfloat16 or float16: a quantised "
            "model cannot be compressed, start from the original"
        )
    return Linear(module.weight, module.bias)
