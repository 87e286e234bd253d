"""Non-negative relative least squares: how a time grows, and how well the fit agrees with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Fit:
    """value ≈ Σ coefficient · feature. `residuals`: (measured - fitted) / measured, of each measurement."""

    coefficients: dict[str, float]
    residuals: list[float]

    def predict(self, features: dict[str, float]) -> float:
        return sum(self.coefficients[name] * features[name] for name in self.coefficients)

    @property
    def rounded_residuals(self) -> list[float]:
        return [round(r, 3) for r in self.residuals]


def fit(features: Sequence[dict[str, float]], values: Sequence[float]) -> Fit:
    """Return the coefficients with the least relative errors, so that small values count as much as large
    ones.

    No coefficient is negative: more work never takes less time. Features are few, so every set of them is
    tried.

    Raise ValueError for fewer values than coefficients.
    """
    names = list(features[0])
    if len(values) < len(names):
        raise ValueError(f"a fit of {len(names)} coefficients has {len(values)} measurements, wanted as many")
    measured = np.array(values, dtype=float)
    A = np.array([[entry[name] for name in names] for entry in features], dtype=float) / measured[:, None]
    solution = min(_candidates(A), key=lambda x: float(np.square(1 - A @ x).sum()))
    return Fit(dict(zip(names, map(float, solution), strict=True)), [float(r) for r in 1 - A @ solution])


def _candidates(A: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the least squares solution of every set of columns whose coefficients are all non-negative."""
    count = A.shape[1]
    size = np.abs(A).max(axis=0)  # features differ by many orders of magnitude
    yield np.zeros(count)
    for chosen in (list(c) for k in range(1, count + 1) for c in combinations(range(count), k)):
        part = np.linalg.lstsq((A / size)[:, chosen], np.ones(len(A)), rcond=None)[0]
        if (part >= 0).all():
            solution = np.zeros(count)
            solution[chosen] = part / size[chosen]
            yield solution
