"""The refit of a rank adapter's `rows` to its rounded B: masked least squares on the token sample."""

import torch
from torch import Tensor

from rana_kernels.ops import reference

RIDGE = 1e-3  # of the mean square of a rank value: it holds the rows of ranks that are seldom live


def refit(x: Tensor, B: Tensor, threshold: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """Return the rows [R, N] that give y best from the masked rank values of a rounded B.

    x [T, K] sampled tokens · B [R, K] · threshold [R] · rows [R, N] of the exact B · y [T, N] wanted outputs

    The error of a rounded rank value is correlated with other rank values, and their rows can make good that
    part. Where there is nothing to make good, the rows stay as they are.
    """
    h = x @ B.T
    z = torch.where(reference.keep(h, threshold), h, 0).double()
    moment = z.T @ z
    ridge = RIDGE * float(moment.diagonal().mean()) * torch.eye(len(moment), dtype=z.dtype, device=z.device)
    return torch.linalg.solve(moment + ridge, z.T @ y.double() + ridge @ rows.double()).to(rows.dtype)
