"""Calibration by several processes: each runs a part of the items, and then all have the same statistics.

Every process reads all items, because the position of a token in the stream decides whether it is sampled.
Process i mod P runs item i. Sums are exact (`exact`), so the number P of processes changes no bit.
"""

import torch
from torch import Tensor
from torch import distributed as dist


class ProcessGroupSums:
    """The processes that calibrate together: those of `group`, or this one alone."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.size, self.rank = (1, 0) if group is None else (group.size(), group.rank())

    def owns(self, item: int) -> bool:
        """Say whether this process runs item `item`."""
        return item % self.size == self.rank

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Replace `tensor` by its sum (or `op`) over all processes, in place, and return it."""
        if self.size > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved, op, self.group)
            tensor.copy_(moved)
        return tensor

    def require_same(self, digest: bytes, items: int) -> None:
        """Raise ValueError unless all processes read the same items, at least one each."""
        own = torch.tensor(list(digest))
        most, least = (self.reduce(own.clone(), op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN))
        if not torch.equal(most, least):
            raise ValueError(
                "calibrate: the processes of the group have different calibrations, wanted the same in each: "
                "they deal out its items among themselves"
            )
        if items < self.size:
            raise ValueError(
                f"calibrate: the calibration has {items} items for {self.size} processes, wanted one each"
            )


def exact(product: Tensor) -> Tensor:
    """Return a float32 matrix Σ x xᵀ [K, K], rounded so that float64 sums of such matrices are exact.

    The grid step is 2^-27 of the largest value that the diagonal allows for an entry; float32 products
    already err by 2^-24. Sums on this grid need no rounding, so they are the same in every order.
    """
    # 2^power_i is at least the square root of entry (i, i), so entry (i, j) is at most 2^(power_i + power_j)
    power = (torch.frexp(product.diagonal()).exponent + 1).div(2, rounding_mode="floor").float()
    unit = torch.exp2(-power)
    steps = product.mul(unit[:, None] * 2**27).mul_(unit).round_()
    return steps.div_(unit[:, None] * 2**27).div_(unit)
