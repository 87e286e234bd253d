"""The split of a rank adapter's budget: how many ranks it stores, and how many of them are live on average.

RaNA (arXiv 2503.18216, algorithm 1) considers all pairs (stored ranks R, mean live ranks) that a budget of
R·K + live·N multiply-adds allows, and takes the pair whose mask captures the most energy, Σ h² over the live
ranks. The same holds in any other unit, where a stored rank and a live rank have other costs.
"""

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rana_kernels.allocation.cost import ROUNDING, LinearCost
from rana_kernels.statistics.thresholds import threshold_for

RANK_STEP = 16
PARTS = 4  # steps of `frontier` between few ranks that are always on and the ranks of the best split
_BINS = 2048  # of the histogram, 32 an octave of h²: 64 octaves below the largest, float32 shows no more
_BIN_BITS = 23 - 5  # of a float32's mantissa that are within one bin


@dataclass(frozen=True)
class Split:
    """How many ranks an adapter stores, and how many of them are live.

    rank        stored ranks
    live        mean live ranks a token
    dropped     the energy of the ranks that are not live, mean over tokens, to about one percent
    threshold   None until it is found for the sample
    """

    rank: int
    live: float
    dropped: float
    threshold: float | None = None


def smallest_budget(line: LinearCost) -> float:
    """Return the cost of the smallest rank adapter: 16 stored ranks, one of them live."""
    return line.at(RANK_STEP, 1)


class Splits:
    """The best split of any budget. The histogram of the sample is made once, in the constructor.

    h      rank values [T, F] of the token sample
    line   the cost of stored and live ranks, in the unit of the budgets
    """

    def __init__(self, h: Tensor, line: LinearCost) -> None:
        self.h, self.tokens, self.line = h, len(h), line
        counts, self._value = _histogram(h)
        self._energy = float((counts * self._value).sum())
        # ranks after the last multiple of 16 are never stored, but their energy counts as dropped
        self._energy += float(h[:, len(counts) * RANK_STEP :].square().sum(dtype=torch.float64))
        self._own = counts.double()
        # of all ranks up to one: values in a bin and the larger ones, and the energy of these
        upto = self._own.cumsum(0)
        self._filled, self._holds = upto.cumsum(1), (upto * self._value).cumsum(1)
        self._ranks = torch.arange(1, len(counts) + 1, device=h.device, dtype=torch.float64) * RANK_STEP

    def priced(self, line: LinearCost) -> "Splits":
        """Return the splits of the same sample where rows cost something else."""
        other = copy(self)
        other.line = line
        return other

    def kept(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the live rows and the energy that a split keeps of every rank, means over tokens.

        Both have one value for each stored rank, float64 [rank]: the mean over its sixteen.
        """
        stored = split.rank // RANK_STEP
        room = split.live * self.tokens
        bins = int(torch.searchsorted(self._filled[stored - 1], room - 0.5)) + 1
        counts = self._own[:stored, :bins]
        parts = counts.sum(1), (counts * self._value[:bins]).sum(1)
        share = max(1, self.tokens) * RANK_STEP
        rows, energy = (part.div(share).repeat_interleave(RANK_STEP) for part in parts)
        return rows, energy

    def best(self, budget: float) -> Split:
        """Return the split that drops the least energy at a cost of `budget` a token.

        Raises ValueError if the smallest adapter costs more.
        """
        live, captured = self._captured(budget)
        return self._split(live, captured, len(captured))

    def frontier(self, budget: float) -> list[Split]:
        """Return splits that store more and more ranks and drop less; the best is last. Raises as `best`."""
        live, captured = self._captured(budget)
        most = int(captured.argmax()) + 1
        # with fewer stored ranks, all could be live and some of the budget would be left over
        few = min(most, max(1, int((live == self._ranks).sum())))
        limits = sorted({few + (most - few) * i // PARTS for i in range(PARTS + 1)})
        return list({s.rank: s for s in (self._split(live, captured, limit) for limit in limits)}.values())

    def _captured(self, budget: float) -> tuple[Tensor, Tensor]:
        """Return, for 16, 32, … stored ranks, the live ranks that `budget` pays for and the energy in them.

        The energy is -1 where the budget does not pay for one live rank.
        """
        ranks, line = self._ranks, self.line
        live = ((budget - line.fixed - ranks * line.stored) / line.live).minimum(ranks)
        if len(ranks) == 0 or live[0] < 1 - ROUNDING:
            raise ValueError(
                f"a rank adapter has a budget of {budget:.6g}, wanted at least {smallest_budget(line):.6g}, "
                "for one live rank of 16: ask for a smaller reduction"
            )
        # bins go from the largest values down, and the last one that is needed is needed in part
        room = (live * self.tokens)[:, None]
        last = torch.searchsorted(self._filled, room).clamp_max(_BINS - 1)
        unused = (self._filled.gather(1, last) - room).clamp_min(0)
        captured = (self._holds.gather(1, last) - unused * self._value[last])[:, 0]
        captured[live < 1 - ROUNDING] = -1
        return live, captured

    def _split(self, live: Tensor, captured: Tensor, limit: int) -> Split:
        """Return the best split with at most `limit` times 16 stored ranks."""
        best = int(captured[:limit].argmax())
        dropped = max(0.0, self._energy - float(captured[best])) / max(1, self.tokens)
        return Split(RANK_STEP * (best + 1), float(live[best]), dropped)

    def exact(self, budget: float) -> Split:
        """Return the best split with its threshold, and with the live ranks that the threshold gives."""
        split = self.best(budget)
        threshold, live = threshold_for(self.h[:, : split.rank].abs(), split.live)
        return replace(split, live=live, threshold=threshold)


def _histogram(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return a histogram [F / 16, bins] of h² for each 16 ranks, and the value [bins] of each bin.

    A bin holds the squares whose floats have the same leading bits, counted down from the largest. A
    histogram serves every R with one pass over the sample, where sorting would need one pass for each.
    """
    blocks = h.shape[1] // RANK_STEP
    bits = h[:, : blocks * RANK_STEP].float().square().view(torch.int32)  # in the order of the squares
    top = bits.max() if bits.numel() else bits.new_zeros(())
    block = torch.arange(blocks, device=h.device, dtype=torch.int32).repeat_interleave(RANK_STEP) * _BINS
    counts = torch.zeros(blocks * _BINS, dtype=torch.int64, device=h.device)
    for part in bits.split(256):
        bins = ((top - part) >> _BIN_BITS).clamp_max_(_BINS - 1) + block
        counts += torch.bincount(bins.flatten(), minlength=blocks * _BINS)
    width = 1 << _BIN_BITS
    middle = top - torch.arange(_BINS, device=h.device, dtype=torch.int32) * width - width // 2
    return counts.view(blocks, _BINS), middle.clamp_min(0).view(torch.float32).double()
