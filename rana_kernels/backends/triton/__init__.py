"""The ops in Triton. This file does not import triton: the kernels are imported at the first call.

`import rana_kernels` must work on machines that have no triton or no graphics card.
"""

import os
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import torch


def available() -> bool:
    """Return whether the triton package is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether kernels run in triton's interpreter. It serves CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def register(names: Iterable[str], *keys: str) -> torch.library.Library:
    """Register the named ops for the dispatch keys "CUDA", "CPU" or both."""
    library = torch.library.Library("rana", "IMPL")
    for name in names:
        for key in keys:
            library.impl(name, _imported_when_called(name), key)
    return library


def _imported_when_called(name: str):
    def op(*args):
        return getattr(import_module(f"rana_kernels.backends.triton.{name}"), name)(*args)

    return op
