"""A model of how the loss depends on where a budget goes, learnt from a few measurements.

An allocation gives every site (linears that read one input) a number: by how many powers of e it counts
more than in the reference, which is all zeros. RankAdaptor (arXiv 2406.15734) lets a small network learn
what comes of it. Here it is a regression on what that function is near an optimum, a quadratic whose
coefficients depend on the kind of a site and its depth: it needs fewer measurements than sites, knows how
sure it is, and carries over to models of other depths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.calibrate import INPUTS

SLOPES, CURVES = 3, 2  # coefficients for each role: powers of the depth
SIZE = len(INPUTS) * (SLOPES + CURVES) + 1
CURVATURE = 0.3  # expected before anything is measured: to leave the reference costs
NOISE = 0.03  # of an outcome, mostly what a quadratic leaves out
EARLIER = 0.1  # what a measurement of another run weighs: another model is another function


@dataclass(frozen=True)
class Site:
    """Linears that read one input, as a run on another model can know them.

    role    the input: "qkv", "o", "mlp" or "down"
    depth   of the block, from 0 to 1
    share   of what the reference loses (or costs) there; all sites together 1
    """

    role: str
    depth: float
    share: float


def features(sites: list[Site], allocations: Tensor) -> Tensor:
    """[n, SIZE] float64 of allocations [n, sites]. A number added to all of an allocation changes nothing."""
    share = torch.tensor([site.share for site in sites], dtype=torch.float64)
    depth = torch.tensor([site.depth for site in sites], dtype=torch.float64)
    a = allocations.double()
    a = a - (a @ share)[:, None]
    columns = [(a * share * _size(share)).sum(1)]
    for role in INPUTS:
        part = share * torch.tensor([site.role == role for site in sites])
        columns += [(a * part * (2 * depth - 1) ** power).sum(1) for power in range(SLOPES)]
        columns += [(a.square() * part * (2 * depth - 1) ** power).sum(1) for power in range(CURVES)]
    return torch.stack(columns, dim=1)


def _size(share: Tensor) -> Tensor:
    """How large each share is among the shares, by its logarithm: mean 0, deviation 1."""
    log = share.clamp_min(1e-12).log()
    return (log - log.mean()) / log.std(correction=0).clamp_min(1e-6)


class PerformanceModel:
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
