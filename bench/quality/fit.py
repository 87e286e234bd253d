"""Equal cost: the budget to ask for so that the cost measured on the evaluation text is the one wanted.

Thresholds come from the calibration text, and on other text they keep a little more or less; methods
differ in how much. So the cost of a candidate is measured, and one with a corrected budget is built,
until the two agree.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.quality.contenders import Candidate
from bench.quality.subject import BATCH
from rana_kernels.evaluation.metrics import count_live_rows

TOLERANCE = 0.005  # of the dense cost
FIT_ROWS = 16  # of the evaluation text, spread over it, on which the cost is measured for the fit
TRIES = 4


def fit(
    build: Callable[[float], Candidate], keep: float, rows: Tensor, first: float | None = None
) -> tuple[Candidate, float]:
    """A candidate that costs `keep` on some of `rows`, and what was asked for to get it.

    first   what to ask for first; None: `keep`

    Raises ValueError for a budget that the method cannot meet.
    """
    some = rows[torch.linspace(0, len(rows) - 1, min(FIT_ROWS, len(rows))).round().long()]
    asked, tried = first or keep, []
    for _ in range(TRIES):
        candidate = build(asked)
        found = measured_keep(candidate, some)
        tried.append((abs(found - keep), asked, found, candidate))
        # ranks come whole: asking for a little more may change nothing
        if tried[-1][0] <= TOLERANCE / 2 or found in (cost for _, _, cost, _ in tried[:-1]):
            break
        asked += keep - found
    miss, asked, found, candidate = min(tried, key=lambda entry: entry[0])
    if miss > TOLERANCE:
        raise ValueError(f"asked for {asked:.3f} it costs {found:.3f}, wanted {keep}")
    return candidate, asked


def measured_keep(candidate: Candidate, rows: Tensor) -> float:
    if not candidate.costs.row:
        return candidate.costs.cost_ratio({})
    return candidate.costs.cost_ratio(count_live_rows(candidate.model, rows, batch=BATCH, progress=False))
