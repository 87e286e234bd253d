"""The decomposition of a linear for its inputs: the leading left singular vectors of W X.

RaNA (arXiv 2503.18216, algorithm 1) takes the singular value decomposition of W X, where X has one column for
each token. The left singular vectors are the eigenvectors of W Σ Wᵀ with Σ = X Xᵀ, so the second moment is
enough. The eigenproblem is solved on the smaller side of W. It is solved in float64, because the spectrum of
Σ spans twice as many orders of magnitude as the singular values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Factors:
    """W ≈ A B for every number of ranks: the first R rows of Aᵀ and of B are the best R ranks.

    There are F = min(N, K) ranks, by falling energy. `rows` and `B` have the dtype of W.

    rows     Aᵀ [F, N], rows of length 1 (orthonormal in the metric "output")
    B        [F, K]; it is Aᵀ W in the metric "output"
    norms    [F] float32: dropping a rank value h adds (h / norms)² to the error. All 1 in the metric "output"
    energy   [F] float64: Σ (h / norms)² over all calibration tokens
    """

    rows: Tensor
    B: Tensor
    norms: Tensor
    energy: Tensor


def decompose(weight: Tensor, moment: Tensor, metric: Tensor | None = None) -> Factors:
    """Return the factors of `weight` [N, K] for the inputs of a calibration.

    moment   the second moment [K, K] of the inputs, times any positive number. If N < K, it may be the second
             moment [N, N] of the outputs instead
    metric   [N] float64: a factor for the error of each output. The ranks are then those of diag(metric) W,
             whose dropped energy is the weighted error. `rows` still have length 1

    It works for any number of calibration tokens: directions that no token had come last.
    """
    d = torch.ones(len(weight), dtype=torch.float64, device=weight.device) if metric is None else metric
    wide = d[:, None] * weight.double()
    A, energy = _directions(wide, d, moment.double())
    U = _fix_signs(A.T.contiguous())
    norms = (U / d).norm(dim=1, keepdim=True)
    rows, B = (U / d / norms).float(), (U * d * norms).float() @ weight.float()
    return Factors(rows.to(weight.dtype), B.to(weight.dtype), norms[:, 0].float(), energy)


def _directions(W: Tensor, d: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors [N, F] of W X and their energies [F], largest first."""
    N, K = W.shape
    if N >= K:
        return _tall(W, moment)
    return _narrow(d[:, None] * moment * d if len(moment) == N else W @ moment @ W.T)


def _narrow(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """For N < K, return the eigenvectors of W Σ Wᵀ [N, N], the second moment of the outputs."""
    energy, A = torch.linalg.eigh(outputs)
    return A.flip(1), energy.flip(0).clamp_min(0)


def _tall(W: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """For N >= K, return the directions W S V, with Σ = S Sᵀ and V the eigenvectors of Sᵀ Wᵀ W S [K, K].

    The norms of the directions are the singular values. QR divides by them and keeps the directions of small
    ones orthogonal to those of large ones; a plain division would lose half the digits.
    """
    S = _square_root(moment)
    energy, V = torch.linalg.eigh(S.T @ (W.T @ W) @ S)
    A, _ = torch.linalg.qr(W @ (S @ V.flip(1)))
    return A, energy.flip(0).clamp_min(0)


def _square_root(moment: Tensor) -> Tensor:
    """Return a lower triangular S with S Sᵀ = Σ + jitter, the jitter as small as the factorisation allows.

    The jitter gives a very small energy to directions that no token had, so W decides their order.
    """
    size = moment.shape[0]
    mean = moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    for exponent in range(-12, 1):
        jitter = torch.eye(size, dtype=moment.dtype, device=moment.device) * (mean * 10.0**exponent)
        S, failed = torch.linalg.cholesky_ex(moment + jitter)
        if not failed:
            return S
    raise ValueError("decompose: the second moment is not positive semi-definite: calibrate again")


def _fix_signs(rows: Tensor) -> Tensor:
    """Make the largest entry of every row positive, because the sign of an eigenvector is arbitrary."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)
