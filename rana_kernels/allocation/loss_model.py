"""A regression that predicts the loss of an allocation from a few measured ones.

An allocation has one number a for each input of each block: the errors of the linears that read this input
are multiplied by e^a. In the reference allocation every number is 0. RankAdaptor (arXiv 2406.15734) trains a
small network to predict the loss. Near an optimum the loss is quadratic in the allocation, so a Bayesian
linear regression is enough here. Its coefficients depend on the kind of input and on the depth of the block.
Therefore it needs fewer measurements than there are inputs, and it applies to models of other depths. It also
says how uncertain a prediction is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.statistics.calibration import INPUTS

# Each kind of input has so many linear and quadratic coefficients, one for each power of the depth.
SLOPES, CURVES = 3, 2
SIZE = len(INPUTS) * (SLOPES + CURVES) + 1
CURVATURE = 0.3  # the prior mean of the quadratic coefficients: leaving the reference raises the loss
NOISE = 0.03  # standard deviation of an outcome around the quadratic
EARLIER = 0.1  # the weight of a measurement of another run, whose model may behave differently


@dataclass(frozen=True)
class InputShare:
    """One input of one block, described so that a run on another model can use its measurements.

    input   "qkv", "o", "mlp" or "down"
    depth   the position of the block, from 0 (first) to 1 (last)
    share   the part of the reference's total error (or cost) that belongs to this input; all shares sum to 1
    """

    input: str
    depth: float
    share: float


def features(inputs: list[InputShare], allocations: Tensor) -> Tensor:
    """Return the regressors [n, SIZE] float64 of allocations [n, inputs].

    Adding one constant to all numbers of an allocation changes nothing.
    """
    share = torch.tensor([own.share for own in inputs], dtype=torch.float64)
    depth = torch.tensor([own.depth for own in inputs], dtype=torch.float64)
    a = allocations.double()
    a = a - (a @ share)[:, None]
    columns = [(a * share * _standardised(share)).sum(1)]
    for name in INPUTS:
        part = share * torch.tensor([own.input == name for own in inputs])
        columns += [(a * part * (2 * depth - 1) ** power).sum(1) for power in range(SLOPES)]
        columns += [(a.square() * part * (2 * depth - 1) ** power).sum(1) for power in range(CURVES)]
    return torch.stack(columns, dim=1)


def _standardised(share: Tensor) -> Tensor:
    """Return the logarithms of the shares, shifted and scaled to mean 0 and deviation 1."""
    log = share.clamp_min(1e-12).log()
    return (log - log.mean()) / log.std(correction=0).clamp_min(1e-6)


class LossModel:
    """Bayesian linear regression of outcomes: the loss minus that of the reference, in the caller's unit.

    The outcome of the reference is 0. The prior of the coefficients is normal. Its mean is a function whose
    minimum is at the reference.
    """

    def __init__(self) -> None:
        self.precision = torch.eye(SIZE, dtype=torch.float64)
        self.weighted = torch.zeros(SIZE, dtype=torch.float64)  # precision times mean
        self.weighted[1 + SLOPES :: SLOPES + CURVES] = CURVATURE

    def learn(self, seen: Tensor, outcomes: Tensor, weight: float = 1.0) -> None:
        """Update the coefficients with measurements: features [n, SIZE] and outcomes [n]."""
        scaled = weight / NOISE**2 * seen.T
        self.precision += scaled @ seen
        self.weighted += scaled @ outcomes.double()

    def predict(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [n] of the outcomes of features [n, SIZE]."""
        factor = torch.linalg.cholesky(self.precision)
        mean = torch.cholesky_solve(self.weighted[:, None], factor)[:, 0]
        spread = torch.linalg.solve_triangular(factor, asked.T, upper=False).norm(dim=0)
        return asked @ mean, spread
