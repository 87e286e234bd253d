"""The steps of quantised weights: one for each group of a row. A weight is a whole number times its step.

In 8 bits, the largest value of a group becomes ±127. In 4 and 3 bits, several steps are tried, and the one
of least squared error is kept. Such a step may be negative: the largest value of the group then becomes -8
(or -4), whatever its sign, and the whole range is used. Other steps of the trial clip the largest value,
which leaves a finer step for all others.
"""

import torch
from torch import Tensor

BOUNDS = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3)}
# What the largest value of a group becomes, before clipping, in the order of trial: these parts of the bound.
_PARTS = (1.0, 0.875, 0.9125, 0.95, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3125, 1.375)
_TARGETS = {8: (127.0,), **{bits: tuple(BOUNDS[bits][0] * part for part in _PARTS) for bits in (4, 3)}}
_TINY = 2.0**-24  # the smallest positive float16
_NORMAL = 2.0**-14  # below it, float16 has multiples of _TINY only
CHUNK = 1 << 22  # values that are tried at once, so that large weights need little extra memory


def grouped(values: Tensor, group: int) -> Tensor:
    """Return [..., N] as [..., groups, group]. A shorter last group is filled with zeros."""
    missing = -values.shape[-1] % group
    return torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, group))


def find_steps(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return the steps [..., groups] of the groups in `values` [..., groups, group], both float32.

    importance   how much the squared error of each value counts, [groups, group]

    The steps are numbers that float16 has. The step of a group of zeros is 0.
    """
    if len(_TARGETS[bits]) > 1 and values.dim() > 2 and values.numel() > CHUNK:
        count = max(1, len(values) * CHUNK // values.numel())
        return torch.cat([find_steps(part, bits, importance) for part in values.split(count)])
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    targets = values.new_tensor(_TARGETS[bits]).view(-1, *[1] * values.dim())
    trials = _as_float16(largest / targets)
    if len(trials) == 1:
        return trials[0].squeeze(-1).abs()
    errors = _nearest(values, trials, bits).mul_(trials).sub_(values).square_()
    if importance is not None:
        errors *= importance
    best = errors.sum(-1, keepdim=True).argmin(0, keepdim=True)
    return trials.gather(0, best)[0].squeeze(-1)


def round_to(values: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Return the nearest whole numbers for these steps, as float32. They are 0 where the step is 0."""
    return _nearest(values, steps, bits).where(steps != 0, 0.0)


def _nearest(values: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Do the same, but leave values as they are where the step is 0."""
    low, high = BOUNDS[bits]
    return (values / steps.where(steps != 0, 1.0)).round_().clamp_(low, high)


def _as_float16(steps: Tensor) -> Tensor:
    """Round steps to float16, but tiny ones away from zero, so that no step of a value becomes 0."""
    tiny = (steps.abs() / _TINY).ceil() * _TINY * steps.sign()
    return torch.where(steps.abs() < _NORMAL, tiny, steps).half().float()
