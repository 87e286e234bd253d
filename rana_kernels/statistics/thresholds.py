"""The choice of a threshold: an adapter keeps the rows whose score reaches it."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def threshold_for(score: Tensor, live: float) -> tuple[float, float]:
    """Return the threshold that keeps `live` of the R scores [T, R] a token, and the mean that it keeps.

    There is one threshold for all ranks and tokens, so one token or rank can have more live rows than
    another.
    """
    (found,) = thresholds_for(score, [live])
    return found


def thresholds_for(score: Tensor, lives: Sequence[float]) -> list[tuple[float, float]]:
    """Return what `threshold_for` does, for each of `lives`, from one sort."""
    tokens, rows = score.shape
    ordered = np.sort(score.detach().cpu().numpy(), axis=None)  # many times as fast as torch's sort on a CPU

    def at(live: float) -> tuple[float, float]:
        count = round(live * tokens)
        if count >= len(ordered):
            return 0.0, float(rows)
        threshold = ordered[-1] * 2 if count < 1 else ordered[-count]
        if threshold == 0 and ordered[-1] > 0:
            # exact zeros (of ReLU) add nothing, so never keep them
            threshold = ordered[np.searchsorted(ordered, 0, side="right")]
        return float(threshold), float(len(ordered) - np.searchsorted(ordered, threshold)) / tokens

    return [at(live) for live in lives]


def evenly(length: int, count: int) -> slice:
    """Return the slice that takes about `count` of `length` rows, evenly spaced."""
    return slice(None, None, -(-length // count))
