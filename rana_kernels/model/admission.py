"""Checks of a model before any work on it.

`admit` takes off wrappers, for every function that is given a model. `require_dense` is asked of a model that
will be calibrated or compressed.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from rana_kernels.model.architectures import Block
from rana_kernels.model.quantized import QUANT_METHOD, quantization_of, refuse_quantized


def admit(model: nn.Module, *, changes: bool) -> Any:
    """Return the model within `torch.compile`, DataParallel and DistributedDataParallel.

    changes   whether the model will get other parameters. A compiled model and DataParallel see them, but
              DistributedDataParallel goes on synchronising the old ones

    Raises ValueError for DistributedDataParallel with `changes`, for FSDP, and for a model with LoRAs.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) and changes:
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would go on synchronising the parameters "
            "that it has now: give model.module, and wrap the result"
        )
    if _is_a(model, "FullyShardedDataParallel"):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel, and this process has a share of its weights, "
            "wanted whole ones: load the model without FSDP"
        )
    _refuse_lora(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return admit(model.module, changes=changes)
    compiled = model._modules.get("_orig_mod")  # of torch.compile
    return model if compiled is None else admit(compiled, changes=changes)


def _refuse_lora(model: nn.Module) -> None:
    """Raise ValueError if PEFT wraps the model, or has put layers of its own into it."""
    layers = (name for name, module in model.named_modules() if _is_a(module, "BaseTunerLayer"))
    first = next(layers, None)
    if first is None and not _is_a(model, "PeftModel"):
        return
    has = f"layers of PEFT ({first})" if first else f"a wrapper of PEFT ({type(model).__name__})"
    compressed = quantization_of(getattr(model, "config", None)).get("quant_method") == QUANT_METHOD
    merge = "rana_kernels.integrations.peft.merge(model)" if compressed else "model.merge_and_unload()"
    raise ValueError(f"the model has {has}, wanted plain layers: merge first, model = {merge}")


def _is_a(module: nn.Module, kind: str) -> bool:
    """Say whether a module has a class of this name, of a package that need not be there."""
    return any(base.__name__ == kind for base in type(module).__mro__)


def require_dense(model: nn.Module, blocks: list[Block]) -> None:
    """Raise ValueError unless the linears of `blocks` are plain floats, and each is used in one place.

    Also unless the whole model is in memory, and its weights are finite.
    """
    names = [name for block in blocks for name in block.linears]
    refuse_quantized(model, names)
    _refuse_shared(model, names)
    require_in_memory(model)
    _require_finite(model)


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError if two linears are one module: each place needs a mask of its own."""
    places: dict[nn.Module, str] = {}
    for name in names:
        first = places.setdefault(model.get_submodule(name), name)
        if first != name:
            raise ValueError(
                f"{first} and {name} are one module, which layers share, wanted a module for each: copy it "
                "(copy.deepcopy), so that each layer gets masks of its own"
            )


def _require_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            extremes = torch.stack(torch.aminmax(parameter.detach()))
            if not extremes.isfinite().all():
                raise ValueError(
                    f"{name} holds values that are not finite, wanted finite weights: its file is damaged, "
                    "or the weights overflowed when they became 16-bit numbers"
                )


def require_in_memory(model: nn.Module) -> None:
    """Raise ValueError, which names a tensor, if a part of the model is on disk or was never loaded.

    Also if a weight was made under `torch.inference_mode`: such a weight takes part in no gradient.
    """
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device: it was offloaded or never loaded, wanted every weight in "
                'memory: load the model without device_map, or with device_map="cpu"'
            )
        if tensor.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode, wanted weights that gradients can pass: "
                "load the model outside of it"
            )


def _tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
