"""Models that another package has quantised. They are refused, because their weights are rounded already."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from rana_kernels.model.linears import linear_of

QUANT_METHOD = "rana"  # our name in transformers' field "quant_method"
# These methods leave plain linears if they cannot keep a weight packed, and their config stays all the same.
UNPACKED = ("gguf",)
TRACES = ("hf_quantizer", "quantization_method")  # of a quantizer, on the model


def quantization_of(config: Any) -> dict[str, Any]:
    """Return `quantization_config` of a config of transformers, or of its text part, {} if there is none."""
    for part in (config, getattr(config, "text_config", None)):
        found = getattr(part, "quantization_config", None)
        if found:
            return found if isinstance(found, dict) else found.to_dict()
    return {}


def method_of(fields: dict[str, Any]) -> str | None:
    """Return the method of a `quantization_config`, or None if it names none or is our own."""
    if not fields:
        return None
    method = fields.get("quant_method", "bitsandbytes")  # which once wrote no name
    name = str(getattr(method, "value", method))
    return None if name == QUANT_METHOD else name


def refuse_quantized_config(what: str, config: Any) -> None:
    """Raise ValueError if a config says that the weights are quantised. `what` is the name of the model."""
    method = method_of(quantization_of(config))
    if method is not None:
        raise ValueError(_refusal(what, f"is quantised ({method})"))


def refuse_quantized(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if `model` is quantised: by its config, its quantizer, or its linears `names`.

    A model that transformers loaded from a GGUF file or with `dequantize=True` is accepted if its linears are
    plain.
    """
    what = type(model).__name__
    quantizer = getattr(model, "hf_quantizer", None)
    for fields in (quantization_of(getattr(model, "config", None)), quantization_of(quantizer)):
        method = method_of(fields)
        if method is not None and method not in UNPACKED and not fields.get("dequantize"):
            raise ValueError(_refusal(what, f"is quantised ({method})"))
    for name in names:
        linear_of(model, name)
        weight = model.get_submodule(name).weight
        if type(weight) is not nn.Parameter:  # torchao packs in the weight, and tells the dtype of floats
            raise ValueError(_refusal(what, f"has a {type(weight).__name__} as the weight of {name}"))


def forget_quantizer(model: nn.Module) -> None:
    """Drop a quantizer of transformers that left plain linears, because it would refuse to save the model."""
    changed: Any = model
    for name in TRACES:
        if name in vars(model):
            delattr(changed, name)
            changed.is_quantized = False


def _refusal(what: str, has: str) -> str:
    return f"{what} {has}, wanted plain floats: give the original model, or one that was dequantised"
