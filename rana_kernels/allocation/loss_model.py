"""A model of how the loss depends on where a budget goes, learnt from a few measurements.

An allocation gives every input (of the linears that read it) a number: the power of e by which its errors count
more than in the reference, whose numbers are all zero. RankAdaptor (arXiv 2406.15734) trains a small network to
predict the loss of an allocation. Near an optimum that function is quadratic, so a regression does here: its
coefficients depend on the kind of input and on its depth. It needs fewer measurements than there are inputs,
knows how sure it is, and carries over to models of other depths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.statistics.calibration import INPUTS

SLOPES, CURVES = 3, 2  # coefficients for each kind of input: powers of the depth
SIZE = len(INPUTS) * (SLOPES + CURVES) + 1
CURVATURE = 0.3  # expected before anything is measured: to leave the reference costs
NOISE = 0.03  # of an outcome, mostly what a quadratic leaves out
EARLIER = 0.1  # what a measurement of another run weighs: another model is another function


@dataclass(frozen=True)
class InputShare:
    """Linears that read one input, as a run on another model can know them.

    input   the linears' input: "qkv", "o", "mlp" or "down"
    depth   of the block, from 0 to 1
    share   of what the reference loses (or costs) there; all sites together 1
    """

    input: str
    depth: float
    share: float


def features(inputs: list[InputShare], allocations: Tensor) -> Tensor:
    """Return [n, SIZE] float64 for allocations [n, inputs]. Adding a number to a whole allocation changes nothing."""
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
    """Predicts outcomes: the loss over that of the reference, in units that the caller keeps to.

    The outcome of the reference is 0. Coefficients are normally distributed, before any measurement
    around those of a function that has its minimum there.
    """

    def __init__(self) -> None:
        self.precision = torch.eye(SIZE, dtype=torch.float64)
        self.weighted = torch.zeros(SIZE, dtype=torch.float64)  # precision times mean
        self.weighted[1 + SLOPES :: SLOPES + CURVES] = CURVATURE

    def learn(self, seen: Tensor, outcomes: Tensor, weight: float = 1.0) -> None:
        """Take in measurements: features [n, SIZE] and outcomes [n]."""
        scaled = weight / NOISE**2 * seen.T
        self.precision += scaled @ seen
        self.weighted += scaled @ outcomes.double()

    def predict(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n] of the outcomes of features [n, SIZE]."""
        factor = torch.linalg.cholesky(self.precision)
        mean = torch.cholesky_solve(self.weighted[:, None], factor)[:, 0]
        spread = torch.linalg.solve_triangular(factor, asked.T, upper=False).norm(dim=0)
        return asked @ mean, spread
