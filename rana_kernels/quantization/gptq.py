"""GPTQ (Frantar et al., arXiv 2210.17323): the error of a rounded value is made good by values still to come.

The matrix here is a stack of lines [n, m], and an input multiplies the lines: y = Σ x_i line_i. Lines are
rounded one after the other. The error of a line is spread over the lines that are not rounded yet, in the way
that changes y least under the second moment of x. If this moment is diagonal, nothing is spread, and every
line is rounded to nearest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # lines: errors reach the lines after a block in one product
DAMPING = 0.01  # of the mean of the diagonal, is added to the diagonal

# (index of a line, all lines as they are now) -> the line rounded, as float values
RoundLine = Callable[[int, Tensor], Tensor]


def feedback(moment: Tensor) -> Tensor:
    """Return the upper triangular U [n, n] float32 with Uᵀ U = (moment + damping)⁻¹.

    Its row i says how the error of line i is spread over later lines. A line whose input is always 0 gets and
    gives nothing. Raises ValueError for a moment that is not positive semi-definite.
    """
    factor = _factor(moment)
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, unit, upper=True).float()


def unexplained(moment: Tensor) -> Tensor:
    """Return [n] float64: the part of each line's mean squared input that later lines cannot make good.

    GPTQ changes y by the sum of these parts, each times the squared rounding error of its line. They are the
    squares of 1 / U_ii.
    """
    return _factor(moment).diagonal().square()


def _factor(moment: Tensor) -> Tensor:
    """Return the upper triangular V [n, n] float64 with V Vᵀ = moment + damping, which is U⁻¹.

    With the order of lines reversed, it is the lower Cholesky factor.
    """
    wide = moment.double()
    mean = float(wide.diagonal().mean()) if len(wide) else 0.0
    damped = wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * (DAMPING * mean or 1.0)
    factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError("quantize: the moment is not positive semi-definite: calibrate again")
    return factor.flip(0, 1)


def spread_errors(lines: Tensor, U: Tensor, round_line: RoundLine) -> None:
    """Round the lines [n, m] float32 in place, first to last, and spread each error by `feedback`'s U."""
    for start in range(0, len(lines), BLOCK):
        stop = min(start + BLOCK, len(lines))
        errors = torch.zeros_like(lines[start:stop])
        for i in range(start, stop):
            rounded = round_line(i, lines)
            errors[i - start] = (lines[i] - rounded) / U[i, i]
            lines[i] = rounded
            lines[i + 1 : stop].addr_(U[i, i + 1 : stop], errors[i - start], alpha=-1)
        lines[stop:] -= U[start:stop, stop:].T @ errors
