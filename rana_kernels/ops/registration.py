"""Define the ops in torch's dispatcher: schemas, shapes, gradients, autocast, and the reference for any device."""

import torch
from torch import Tensor

from rana_kernels.ops import checks, gradients, reference
from rana_kernels.ops.schemas import SCHEMAS

# The argument, and the dimension of it, that holds N.
_WIDTH = {
    "masked_linear": ("rows", 1),
    "masked_lowrank_linear": ("rows", 1),
    "masked_mlp": ("down_rows", 1),
    "linear": ("weight", 0),
}

# These are float32 whatever the dtype of the input. Autocast leaves them alone.
_FLOAT32_ARGUMENTS = {"threshold", "norms", "down_norms", "down_threshold"}


def _fake(name: str):
    check = getattr(checks, name)
    argument, dimension = _WIDTH[name]

    def fake(*args):
        filled = [*args, *[None] * (len(_argument_names(name)) - len(args))]
        check(*filled)
        width = filled[_argument_names(name).index(argument)].shape[dimension]
        return filled[0].new_empty((*filled[0].shape[:-1], width))

    return fake


def _argument_names(name: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.rana, name).default._schema.arguments]


def _autocast(name: str, device: str):
    """Cast the input and the weights to the dtype of autocast, and leave thresholds and norms as they are."""
    op = getattr(torch.ops.rana, name).default
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    names = _argument_names(name)

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype) if isinstance(a, Tensor) and n not in _FLOAT32_ARGUMENTS else a
            for n, a in zip(names, args, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*cast)

    return kernel


def define() -> torch.library.Library:
    """Define every op of `SCHEMAS`. The registrations live as long as the library that is returned."""
    library = torch.library.Library("rana", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rana::{name}", _fake(name), lib=library)
        torch.library.register_autograd(
            f"rana::{name}", getattr(gradients, name), setup_context=gradients.save, lib=library
        )
        library.impl(name, _autocast(name, "cpu"), "AutocastCPU")
        library.impl(name, _autocast(name, "cuda"), "AutocastCUDA")
    return library
