"""The choice of a threshold: an adapter keeps the rows whose score reaches it."""

from torch import Tensor


def threshold_for(score: Tensor, live: float) -> tuple[float, float]:
    """Return the threshold that keeps `live` of the R scores [T, R] a token, and the mean that it keeps.

    There is one threshold for all ranks and tokens, so one token or rank can have more live rows than
    another.
    """
    flat, count = score.flatten(), round(live * len(score))
    if count >= flat.numel():
        return 0.0, float(score.shape[1])
    threshold = flat.max() * 2 if count < 1 else flat.kthvalue(flat.numel() - count + 1).values
    if threshold == 0 and (flat > 0).any():
        threshold = flat[flat > 0].min()  # exact zeros (of ReLU) add nothing, so never keep them
    return float(threshold), float((flat >= threshold).sum()) / len(score)


def evenly(length: int, count: int) -> slice:
    """Return the slice that takes about `count` of `length` rows, evenly spaced."""
    return slice(None, None, -(-length // count))
