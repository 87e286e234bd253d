"""Define the ops in torch's dispatcher: schemas, shapes, gradients, autocast, and the reference."""

import torch
from torch import Tensor

from rana_kernels.ops import checks, gradients, reference
from rana_kernels.ops._ops import add_op_namespace_prefix, ops
from rana_kernels.ops.schemas import SCHEMAS

# These arguments have one dtype for every dtype of the input. Autocast does not convert them.
_FIXED_ARGUMENTS = {"threshold", "norms", "down_norms", "down_threshold"}
_FIXED_ARGUMENTS |= {f"{weight}_scale" for weight in ("B", "rows", "up", "gate", "down", "weight")}


def _fake(name: str):
    """Return the function that gives torch the shape of an op's result without computing it."""
    check = getattr(checks, name)

    def fake(x, *others):
        missing = len(_argument_names(name)) - 1 - len(others)
        width = check(x, *others, *[None] * missing)
        return x.new_empty((*x.shape[:-1], width))

    return fake


def _argument_names(name: str) -> list[str]:
    return [a.name for a in getattr(ops, name).default._schema.arguments]


def _autocast(name: str, device: str):
    """Return the op for autocast: it converts the input and float weights, and no other argument."""
    op = getattr(ops, name).default
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    fixed = [n in _FIXED_ARGUMENTS for n in _argument_names(name)]

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and not fixed[i] else a
            for i, a in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*cast)

    return kernel


def register() -> torch.library.Library:
    """Define every op of `SCHEMAS`. The registrations live as long as the library that is returned."""
    library = torch.library.Library(ops.name, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(add_op_namespace_prefix(name), _fake(name), lib=library)
        torch.library.register_autograd(
            add_op_namespace_prefix(name),
            getattr(gradients, name),
            setup_context=gradients.save,
            lib=library,
        )
        library.impl(name, _autocast(name, "cpu"), "AutocastCPU")
        library.impl(name, _autocast(name, "cuda"), "AutocastCUDA")
    return library
