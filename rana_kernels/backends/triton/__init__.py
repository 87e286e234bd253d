"""The ops in Triton. This file needs no triton: the kernels are imported at the first call.

`import rana_kernels` must work on machines without triton, and without a card.
"""

import os
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import torch


def available() -> bool:
    """Whether the triton package is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, which serves CPU tensors (slowly: for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def register(names: Iterable[str], *keys: str) -> torch.library.Library:
    """Register the ops of these names for the dispatch keys "CUDA", "CPU" or both."""
    library = torch.library.Library("rana", "IMPL")
    for name in names:
        for key in keys:
            library.impl(name, _imported_when_called(name), key)
    return library


def _imported_when_called(name: str):
    def op(*args):
        return getattr(import_module(f"rana_kernels.backends.triton.{name}"), name)(*args)

    return op
