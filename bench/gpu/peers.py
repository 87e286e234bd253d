"""Kernels that others published, from checkouts on this machine. None of their code is here.

    <peer-dir>/RaNA   github.com/Roberto09/RaNA, kernel_utils_fast.py: the paper's own kernels
    <peer-dir>/TEAL   github.com/FasterDecoding/TEAL, kernels/sparse_gemv.py: thresholds on the input

Both take one token and add up with atomics, TEAL in float16. So they are timed in float16.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.kernels.cases import Case
from bench.kernels.weights import Call


def published(
    peer_dir: Path | None, case: Case, x: Tensor, weights: list[tuple[Tensor, ...]]
) -> dict[str, list[Call]]:
    """Return {"RaNA": calls, "TEAL": calls}, if they are in `peer_dir` and compute the op of `case`."""
    if peer_dir is None or case.M != 1 or case.dtype != "fp16":
        return {}
    return {
        name: [make(peer_dir / name, x, *given) for given in weights]
        for (name, op), make in PUBLISHED.items()
        if op == case.op and (peer_dir / name).is_dir()
    }


def _rana_lowrank(checkout: Path, x: Tensor, B: Tensor, rows: Tensor, threshold: Tensor) -> Call:
    # the class squares h, and so compares with the threshold's square
    masked = SimpleNamespace(A=_linear(rows.T), B=_linear(B), thresh=float(threshold) ** 2)
    layer = _module(checkout, "kernel_utils_fast").MaskedRankLinearKernel(masked).to(x.device)
    return lambda: layer(x[None])


def _rana_neurons(checkout: Path, h: Tensor, rows: Tensor, threshold: Tensor, norms: Tensor) -> Call:
    """Return a call of RaNA's masked input linear, which adds to zeros."""
    theirs = _module(checkout, "kernel_utils_fast")
    layer = theirs.MaskedInputLinearKernel(_linear(rows.T), float(threshold)).to(h.device)
    layer.W_norm.data.fill_(1)
    return lambda: layer(h[None], torch.zeros(1, 1, rows.shape[1], device=h.device))


def _teal_neurons(checkout: Path, h: Tensor, rows: Tensor, threshold: Tensor, norms: Tensor) -> Call:
    # TEAL imports a wrapper for torch.compile, which needs one more package and is not used here
    sys.modules.setdefault("compile_wrapper", cast(ModuleType, SimpleNamespace(BaseKernel=object)))
    theirs, at = _module(checkout / "kernels", "sparse_gemv"), float(threshold)
    # TEAL tunes by the share that is dropped, in hundredths
    dropped = round(100 * float((h.abs() < at).float().mean()))
    return lambda: theirs.splitk_sparse_gemv(h[None], rows.T, at, dropped)


PUBLISHED = {
    ("RaNA", "masked_lowrank_linear"): _rana_lowrank,
    ("RaNA", "masked_linear"): _rana_neurons,
    ("TEAL", "masked_linear"): _teal_neurons,
}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _module(folder: Path, name: str) -> ModuleType:
    with patch.object(sys, "path", [str(folder), *sys.path]):
        return import_module(name)
