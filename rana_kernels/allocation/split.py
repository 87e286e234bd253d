"""How a rank adapter spends its budget: few ranks that are mostly on, or many that are mostly off.

RaNA (arXiv 2503.18216, algorithm 1): of all pairs (stored ranks R, mean live ranks) that a budget of
R·K + live·N multiply-adds allows, take the one whose mask captures the most energy, Σ of the kept h². The
same in any other unit: a stored rank has a price, and a live one.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rana_kernels.allocation.cost import ROUNDING, LinearCost
from rana_kernels.statistics.thresholds import threshold_for

RANK_STEP = 16
PARTS = 4  # between few ranks that are always on and those of the best split: where `frontier` looks
_BINS = 2048
_OCTAVES = 64  # of h², below its largest value: more than float32 squares resolve


@dataclass(frozen=True)
class Split:
    """Stored ranks, and the live ones of a mean token. `dropped`: the mean over tokens of the energy that
    is not kept, to about a hundredth of itself. `threshold`: None until one is found for the sample."""

    rank: int
    live: float
    dropped: float
    threshold: float | None = None


def smallest_budget(line: LinearCost) -> float:
    """What the smallest rank adapter costs that is worth storing: one live rank of 16."""
    return line.at(RANK_STEP, 1)


class Splits:
    """The best split of any budget, for rank values `h` [T, F] of the token sample, counted once.

    line   what stored and live ranks cost, in the unit of the budgets
    """

    def __init__(self, h: Tensor, line: LinearCost) -> None:
        self.h, self.tokens, self.line = h, len(h), line
        counts, self._value = _histogram(h)
        self._energy = float((counts * self._value).sum())
        # ranks after the last block of 16 are never stored
        self._energy += float(h[:, len(counts) * RANK_STEP :].square().sum(dtype=torch.float64))
        self._counts = counts.cumsum(0).double()
        self._ranks = torch.arange(1, len(counts) + 1, device=h.device, dtype=torch.float64) * RANK_STEP

    def best(self, budget: float) -> Split:
        """The split that loses least at a cost of `budget` a token. ValueError if even the smallest adapter
        costs more."""
        live, captured = self._captured(budget)
        return self._split(live, captured, len(captured))

    def frontier(self, budget: float) -> list[Split]:
        """The best split last, and before it some that store fewer ranks, and lose more. Raises as `best`."""
        live, captured = self._captured(budget)
        most = int(captured.argmax()) + 1
        # with fewer than can all be live at once, some of the budget would be left over
        few = min(most, max(1, int((live == self._ranks).sum())))
        limits = sorted({few + (most - few) * i // PARTS for i in range(PARTS + 1)})
        return list({s.rank: s for s in (self._split(live, captured, limit) for limit in limits)}.values())

    def _captured(self, budget: float) -> tuple[Tensor, Tensor]:
        """For 16, 32, … stored ranks: the live ones that `budget` pays for, and the energy that these keep;
        -1 where that is none."""
        counts, ranks, line = self._counts, self._ranks, self.line
        live = ((budget - line.fixed - ranks * line.stored) / line.live).minimum(ranks)
        if len(ranks) == 0 or live[0] < 1 - ROUNDING:
            raise ValueError(
                f"a rank adapter has a budget of {budget:.6g}, wanted at least {smallest_budget(line):.6g}, "
                "for one live rank of 16: ask for a smaller reduction"
            )
        # of each bin, largest values first, what is left of the `live` share once the bins before are in
        room = live[:, None] * self.tokens - (counts.cumsum(1) - counts)
        captured = (counts.minimum(room.clamp_min(0)) * self._value).sum(1)
        captured[live < 1 - ROUNDING] = -1
        return live, captured

    def _split(self, live: Tensor, captured: Tensor, limit: int) -> Split:
        """The best one of at most `limit` times 16 ranks."""
        best = int(captured[:limit].argmax())
        dropped = max(0.0, self._energy - float(captured[best])) / max(1, self.tokens)
        return Split(RANK_STEP * (best + 1), float(live[best]), dropped)

    def exact(self, budget: float) -> Split:
        """The best split with its threshold, and the live ranks that this keeps."""
        split = self.best(budget)
        threshold, kept = threshold_for(self.h[:, : split.rank].abs(), split.live)
        return replace(split, live=kept, threshold=threshold)


def _histogram(h: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [F / 16, bins] of h² by block of 16 ranks, on a log scale from the largest down, and the
    value of each bin. Counting instead of sorting makes every R cost one pass over the sample together."""
    blocks = h.shape[1] // RANK_STEP
    square = h[:, : blocks * RANK_STEP].float().square()
    top = (
        square.max().clamp_min(torch.finfo(torch.float32).tiny).log2() if square.numel() else h.new_zeros(())
    )
    block = torch.arange(blocks, device=h.device).repeat_interleave(RANK_STEP) * _BINS
    counts = torch.zeros(blocks * _BINS, dtype=torch.int64, device=h.device)
    for part in square.split(256):
        bins = ((top - part.log2()) * (_BINS / _OCTAVES)).clamp(0, _BINS - 1).long()
        counts += torch.bincount((bins + block).flatten(), minlength=blocks * _BINS)
    middle = torch.arange(_BINS, device=h.device, dtype=torch.float64) + 0.5
    return counts.view(blocks, _BINS), torch.exp2(top.double() - middle * (_OCTAVES / _BINS))
