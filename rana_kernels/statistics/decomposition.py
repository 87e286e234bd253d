"""The decomposition of a linear for its inputs: leading left singular vectors of W X, streamed.

RaNA (arXiv 2503.18216, algorithm 1) takes the singular value decomposition of W X, one column of X a
token. Its left vectors are the eigenvectors of W Σ Wᵀ with Σ = X Xᵀ, so the second moment suffices.
The eigenproblem is solved on the smaller side of W, in float64: the spectrum of Σ spans many orders
of magnitude, and its square root only half as many.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Factors:
    """W ≈ A B at every number of ranks: `rows` [F, N] = Aᵀ orthonormal, `B` [F, K] = Aᵀ W.

    F = min(N, K) ranks by falling energy, in the dtype of W. `norms` [F] float32: a rank weighs
    (h / norms)² in the error that was decomposed for; all 1 where that is the error of the output.
    `energy` [F] float64 = Σ (h / norms)² over all calibration tokens.
    """

    rows: Tensor
    B: Tensor
    norms: Tensor
    energy: Tensor


def decompose(weight: Tensor, moment: Tensor, metric: Tensor | None = None) -> Factors:
    """Factors of `weight` [N, K] for inputs of second moment `moment` [K, K] (any positive scale), or,
    where N < K, for outputs of second moment [N, N].

    metric [N] float64: how much an error of each output counts, as a factor of it. The ranks are then
    those of diag(metric) W, whose dropped energy is the weighted error; rows have length 1 all the same.

    Works for any number of calibration tokens: directions that no token had come last.
    """
    d = torch.ones(len(weight), dtype=torch.float64, device=weight.device) if metric is None else metric
    wide = d[:, None] * weight.double()
    A, energy = _directions(wide, d, moment.double())
    U = _fix_signs(A.T.contiguous())
    norms = (U / d).norm(dim=1, keepdim=True)
    rows, B = (U / d / norms).float(), (U * d * norms).float() @ weight.float()
    return Factors(rows.to(weight.dtype), B.to(weight.dtype), norms[:, 0].float(), energy)


def _directions(W: Tensor, d: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    N, K = W.shape
    if N >= K:
        return _tall(W, moment)
    return _narrow(d[:, None] * moment * d if len(moment) == N else W @ moment @ W.T)


def _narrow(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """N < K: the eigenvectors of W Σ Wᵀ [N, N], the second moment of the outputs, themselves."""
    energy, A = torch.linalg.eigh(outputs)
    return A.flip(1), energy.flip(0).clamp_min(0)


def _tall(W: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """N >= K: with Σ = S Sᵀ and V the eigenvectors of Sᵀ Wᵀ W S [K, K], the directions are W S V.

    Their norms are the singular values; QR divides by them and keeps the small ones orthogonal to the
    large, where a plain division would lose half the digits.
    """
    S = _square_root(moment)
    energy, V = torch.linalg.eigh(S.T @ (W.T @ W) @ S)
    A, _ = torch.linalg.qr(W @ (S @ V.flip(1)))
    return A, energy.flip(0).clamp_min(0)


def _square_root(moment: Tensor) -> Tensor:
    """Lower triangular S with S Sᵀ = Σ + jitter.

    The jitter, as small as the factorisation allows, lets directions that no token had take part:
    with next to no energy, ordered by what W makes of them.
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
    """Make the largest entry of every row positive: an eigenvector's sign is arbitrary."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)
