"""Kernels that others published, from checkouts on this machine. None of their code is here.

    <peer-dir>/RaNA   github.com/Roberto09/RaNA, kernel_utils_fast.py: the paper's own kernels
    <peer-dir>/TEAL   github.com/FasterDecoding/TEAL, kernels/sparse_gemv.py: thresholds on the input

Both take one token and add up with atomics, TEAL in float16. So they are timed in float16.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

DTYPE = torch.float16


def rana_lowrank(checkout: Path) -> Callable[[Tensor, Tensor, Tensor, float], Callable[[], Tensor]]:
    """Return f(x [1, K], B, rows, threshold) -> a call of RaNA's masked rank linear."""
    theirs = _module(checkout, "kernel_utils_fast")

    def build(x: Tensor, B: Tensor, rows: Tensor, threshold: float) -> Callable[[], Tensor]:
        # the class squares h, and so compares with the threshold's square
        masked = SimpleNamespace(A=_linear(rows.T), B=_linear(B), thresh=threshold**2)
        layer = theirs.MaskedRankLinearKernel(masked).to(x.device)
        return lambda: layer(x[None])

    return build


def rana_neurons(checkout: Path) -> Callable[[Tensor, Tensor, float], Callable[[], Tensor]]:
    """Return f(h [1, R], rows, threshold) -> a call of RaNA's masked input linear, which adds to zeros."""
    theirs = _module(checkout, "kernel_utils_fast")

    def build(h: Tensor, rows: Tensor, threshold: float) -> Callable[[], Tensor]:
        layer = theirs.MaskedInputLinearKernel(_linear(rows.T), threshold).to(h.device)
        layer.W_norm.data.fill_(1)
        return lambda: layer(h[None], torch.zeros(1, 1, rows.shape[1], device=h.device))

    return build


def teal_neurons(checkout: Path) -> Callable[[Tensor, Tensor, float], Callable[[], Tensor]]:
    """Return f(h [1, R], rows, threshold) -> a call of TEAL's sparse product."""
    # TEAL imports a wrapper for torch.compile, which needs one more package and is not used here
    sys.modules.setdefault("compile_wrapper", cast(ModuleType, SimpleNamespace(BaseKernel=object)))
    theirs = _module(checkout / "kernels", "sparse_gemv")

    def build(h: Tensor, rows: Tensor, threshold: float) -> Callable[[], Tensor]:
        # TEAL tunes by the share that is dropped, in hundredths
        dropped = round(100 * float((h.abs() < threshold).float().mean()))
        return lambda: theirs.splitk_sparse_gemv(h[None], rows.T, threshold, dropped)

    return build


def found(peer_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield (name, checkout) of those that are there."""
    for name in ("RaNA", "TEAL"):
        if peer_dir is not None and (peer_dir / name).is_dir():
            yield name, peer_dir / name


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _module(folder: Path, name: str) -> ModuleType:
    with _on_path(folder):
        return import_module(name)


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
