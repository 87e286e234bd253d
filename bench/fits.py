"""Least squares with what it leaves over: how a time grows, and how far to believe that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """value ≈ Σ coefficient · feature. `residuals`: (measured - fitted) / measured, of each measurement."""

    coefficients: dict[str, float]
    residuals: list[float]

    def predict(self, features: dict[str, float]) -> float:
        return sum(self.coefficients[name] * features[name] for name in self.coefficients)


def fit(features: Sequence[dict[str, float]], values: Sequence[float]) -> Fit:
    """Coefficients whose relative errors are least, so that small measurements count as much as large ones.

    ValueError for fewer measurements than coefficients.
    """
    names = list(features[0])
    if len(values) < len(names):
        raise ValueError(f"a fit of {len(names)} coefficients has {len(values)} measurements, wanted as many")
    measured = np.array(values, dtype=float)
    A = np.array([[entry[name] for name in names] for entry in features], dtype=float) / measured[:, None]
    size = np.abs(A).max(axis=0)  # features differ by many orders of magnitude
    solution = np.linalg.lstsq(A / size, np.ones(len(measured)), rcond=None)[0] / size
    return Fit(dict(zip(names, map(float, solution), strict=True)), [float(r) for r in 1 - A @ solution])
