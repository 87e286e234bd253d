"""Thresholds: which scores of a token sample an adapter keeps."""

from torch import Tensor


def threshold_for(score: Tensor, live: float) -> tuple[float, float]:
    """The threshold that keeps `live` of the R scores [T, R] of a token on average, and what it keeps.

    One threshold for all ranks and tokens: the share of a token or of a rank varies.
    """
    flat, keep = score.flatten(), round(live * len(score))
    if keep >= flat.numel():
        return 0.0, float(score.shape[1])
    threshold = flat.max() * 2 if keep < 1 else flat.kthvalue(flat.numel() - keep + 1).values
    if threshold == 0 and (flat > 0).any():
        threshold = flat[flat > 0].min()  # exact zeros (ReLU) add nothing: never keep them
    return float(threshold), float((flat >= threshold).sum()) / len(score)


def evenly(length: int, count: int) -> slice:
    """Return the slice that takes about `count` of `length` rows, evenly spaced."""
    return slice(None, None, -(-length // count))
