"""The choices for the linears of a block, in all kinds and formats, each with its cost, bytes and loss.

The loss of a choice has two parts: what the mask drops, and what rounding changes (`quantization/loss.py`).
What a neuron adapter drops is measured on tokens whose slopes are known (`statistics/fisher.py`): the mean
square of Σ slope_i·x_i over the dropped inputs, which is twice the rise in loss. What a rank adapter drops is
the energy of its dropped ranks, each output weighted by how strongly the loss depends on it.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rana_kernels.allocation.cost import cost
from rana_kernels.allocation.pricing import Pricing
from rana_kernels.allocation.specs import dense_spec, make_spec
from rana_kernels.allocation.spending import Choice, Curve, Ways
from rana_kernels.allocation.split import RANK_STEP, Splits, smallest_budget
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.nn.format import Format
from rana_kernels.quantization.loss import RoundingLoss
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.thresholds import evenly

SHARES = tuple(i / 48 for i in range(1, 48))  # cost ratios at which a curve has its choices
ORDERED = 256  # tokens whose scores are sorted, to find the thresholds of the shares
# The errors of joint neurons count this many times. A sample does not settle a difference of 1 %, and one
# call is faster than several.
JOINT = 1 / 1.01


def block_curves(calibrated: CalibratedBlock, pricing: Pricing | None = None) -> list[Ways]:
    """Return the ways to adapt each input's linears: each linear alone, or all of them jointly.

    Joint ranks are tried where ranks are the best choice for one of the linears alone, at some cost: the
    decomposition of stacked weights takes longest of all.
    """
    offers = BlockOffers(calibrated, pricing or Pricing())
    curves: list[Ways] = []
    for names in calibrated.block.inputs.values():
        apart = [offers.of_linear(name) for name in names]
        if len(names) == 1:
            curves.append([apart])
            continue
        ranks = offers.ranks(names) if any(map(_has_best_ranks, apart)) else ()
        curves.append([apart, [[*ranks, *offers.neurons(names)]]])
    return curves


def _has_best_ranks(curve: Curve) -> bool:
    """Say whether no choice without ranks costs as little as one with ranks and loses as little."""
    least = math.inf
    for choice in sorted(curve, key=lambda choice: (choice.cost, choice.adapter.kind == "rank")):
        if choice.adapter.kind != "rank":
            least = min(least, choice.error)
        elif choice.error < least:
            return True
    return False


class BlockOffers:
    """The choices for linears of one block. `names` are linears that read one input."""

    def __init__(self, calibrated: CalibratedBlock, pricing: Pricing) -> None:
        self.calibrated, self.rounding = calibrated, RoundingLoss(calibrated)
        self.formats = pricing.formats
        self.itemsize = calibrated.linear(calibrated.block.linears[0]).weight.element_size()
        self.costs = {format: pricing.in_format(format, self.itemsize) for format in pricing.formats}

    def of_linear(self, name: str) -> Curve:
        """Return all choices for one linear alone.

        lm_head gets no ranks. By the weights of the loss they give up rare tokens, and lose twice what the
        estimate says (docs/quantization.md).
        """
        ranks = () if name == self.calibrated.block.head else self.ranks((name,))
        return [*self.dense(name), *ranks, *self.neurons((name,))]

    def dense(self, name: str) -> Iterator[Choice]:
        """Yield the dense linear in each format."""
        for format in self.formats:
            loss = self.rounding.dense(name, format) if format.quantized else 0.0
            yield self._choice(dense_spec(self.calibrated, name).with_format(format), loss)

    def ranks(self, names: tuple[str, ...]) -> Iterator[Choice]:
        """Yield rank adapters of each cost that pays for one: some that store little, then the best."""
        N, K = self.calibrated.weight(names).shape
        if min(K, N) < RANK_STEP:
            return
        scored = Splits(self.calibrated.rank_scores(names, "loss"), self.costs[self.formats[0]].rank(K, N))
        for format in self.formats:
            splits = scored.priced(self.costs[format].rank(K, N))
            rounding = self.rounding.ranks(names, format) if format.quantized else None
            like = make_spec(self.calibrated, "rank", names, RANK_STEP, 1.0, None, "loss").with_format(format)
            for split in self._splits(names, format, splits):
                rounded = rounding.at(*splits.kept(split)) if rounding else 0.0
                adapter = replace(like, rank=split.rank, live=split.live)
                yield self._choice(adapter, split.dropped + rounded)

    def _splits(self, names: tuple[str, ...], format: Format, splits: Splits) -> Iterator:
        for budget in self._budgets(names, format):
            if budget >= smallest_budget(splits.line):
                yield from splits.frontier(budget)

    def neurons(self, names: tuple[str, ...]) -> Iterator[Choice]:
        """Yield neuron adapters of each cost. The losses of their masks are measured by the slopes."""
        x, counted = self.calibrated.paired(self.calibrated.input_of(names)), JOINT if len(names) > 1 else 1.0
        scores = x.abs() * self.calibrated.joint_norms(names, "loss")
        ordered = scores[evenly(len(scores), ORDERED)].flatten().sort(descending=True).values

        def threshold_at(share: float) -> float:
            return float(ordered[min(round(share * len(ordered)), len(ordered) - 1)])

        thresholds = torch.tensor([threshold_at(share) for share in SHARES], device=x.device)
        bins = torch.bucketize(scores, thresholds.flip(0), right=True)
        losses = [_dropped(bins, x * self.calibrated.slopes(name)) for name in names]
        dropped = torch.stack(losses).sum(0)
        rounding = self.rounding.neurons(names, self.formats, threshold_at)
        spec = make_spec(self.calibrated, "neuron", names, x.shape[1], 1.0, None, "loss")
        for format in self.formats:
            like = spec.with_format(format)
            for share, loss in zip(SHARES, dropped.tolist(), strict=True):
                rounded = rounding[format].at(share) if format.quantized else 0.0
                adapter = replace(like, live=share * like.rank)
                yield self._choice(adapter, counted * (loss + rounded))

    def _budgets(self, names: tuple[str, ...], format: Format) -> list[float]:
        linears = [self.calibrated.linear(name) for name in names]
        dense = sum(self.costs[format].dense(x.in_features, x.out_features) for x in linears)
        return [share * dense for share in SHARES]

    def _choice(self, adapter: AdapterSpec, loss: float) -> Choice:
        costs = self.costs[adapter.format]
        return Choice(cost(costs, adapter), adapter.stored_bytes(self.itemsize), loss, adapter)


def _dropped(bins: Tensor, rises: Tensor) -> Tensor:
    """Return the loss [S] float64 of the masks of all SHARES: mean squares of what each drops.

    bins    [P, K] of the inputs: how many of the thresholds, from the lowest, their scores reach
    rises   [P, K]: by how much the loss rises, to first order, for each input that is dropped
    """
    sums = rises.new_zeros(len(rises), len(SHARES) + 1).scatter_add_(1, bins, rises)
    return sums[:, :-1].cumsum(1).double().square().mean(0).flip(0)
