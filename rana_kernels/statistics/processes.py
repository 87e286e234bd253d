"""Calibration by several processes: each runs its share of the items, then all hold the statistics of all.

Every process is given the same items and reads them all, since a token's place in the stream decides whether
it is sampled; item i is run by process i mod P. Sums are exact (`exact`): P changes no bit.
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
        return item % self.size == self.rank

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum (or `op`) over all processes, in place."""
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
    """A float32 matrix Σ x xᵀ [K, K] as float64, on a grid so wide that sums of them need no rounding and are
    the same in every order: 2^-27 of what the diagonal allows an entry. Products err by 2^-24 as it is."""
    # 2^power_i is at least the square root of entry (i, i): entry (i, j) is at most 2^(power_i + power_j)
    power = (torch.frexp(product.diagonal()).exponent + 1).div(2, rounding_mode="floor").double()
    unit = torch.exp2(-power)
    steps = product.double().mul_(unit[:, None] * 2**27).mul_(unit).round_()
    return steps.div_(unit[:, None] * 2**27).div_(unit)
