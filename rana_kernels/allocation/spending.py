"""Spending a budget: of every curve the point that loses least, all together.

At a price for what is budgeted, each linear takes what is cheapest in error plus cost, and the price is the
one at which the model fits. (A Lagrange multiplier finds points on the convex hulls of all curves at once:
Shoham and Gersho, "Efficient bit allocation", 1988.) A cap on memory is a second price, a rent for each
stored byte: at every rent the price is found anew.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.allocation.cost import ROUNDING
from rana_kernels.model.plan import AdapterSpec


@dataclass(frozen=True)
class Choice:
    """One adapter: what a token costs, the bytes that it stores, and its error in the metric of the loss."""

    cost: float
    bytes: int
    error: float
    adapter: AdapterSpec


Curve = list[Choice]
Ways = list[list[Curve]]  # for linears that read one input: each way takes a choice of each of its curves
# powers of two between which a price and a rent are sought: errors span many orders of magnitude
PRICES, RENTS = (-200.0, 200.0), (-200.0, 100.0)
STEPS = 60  # halvings of a range


def spend(curves: list[Ways], budget: float, max_memory: float | None = None) -> list[Choice] | None:
    """Choices of least error together, at a cost of at most `budget` and, if there is a cap, with at most
    `max_memory` bytes to store; None if there are none."""
    offers, budget = _Offers(curves), budget * (1 + ROUNDING)
    room = math.inf if max_memory is None else max_memory
    taken = _at_rent(offers, budget, 0.0)
    if taken is not None and offers.bytes_of(taken) > room:
        taken = _lowest(
            lambda rent: _at_rent(offers, budget, rent), lambda t: offers.bytes_of(t) <= room, RENTS
        )
    return None if taken is None else offers.choices(_spend_rest(offers, taken, budget, room))


def least_cost(curves: list[Ways]) -> float:
    """What is cheapest costs."""
    return sum(min(sum(min(c.cost for c in curve) for curve in way) for way in ways) for ways in curves)


def least_memory(curves: list[Ways], budget: float) -> int | None:
    """Bytes that have to be stored at a cost of at most `budget`; None if that cannot be met."""
    offers = _Offers(curves)
    taken = _at_rent(offers, budget * (1 + ROUNDING), 2.0 ** RENTS[1])
    return None if taken is None else int(offers.bytes_of(taken))


def _at_rent(offers: "_Offers", budget: float, rent: float) -> Tensor | None:
    return _lowest(
        lambda price: offers.taken(price, rent), lambda taken: offers.cost_of(taken) <= budget, PRICES
    )


def _lowest(
    taken_at: Callable[[float], Tensor | None], fits: Callable[[Tensor], bool], powers: tuple[float, float]
) -> Tensor | None:
    """What is taken at the lowest price at which it fits; None if it fits at none."""
    low, high = powers
    best = taken_at(2.0**high)
    if best is None or not fits(best):
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = taken_at(2.0**middle)
        if found is not None and fits(found):
            high, best = middle, found
        else:
            low = middle
    return best


def _spend_rest(offers: "_Offers", taken: Tensor, budget: float, room: float) -> Tensor:
    """What one price leaves over, on points between those of the hulls: the largest gain that fits first."""
    while True:
        curve, choice, gain = offers.best_step(
            taken, budget - offers.cost_of(taken), room - offers.bytes_of(taken)
        )
        if gain <= 0:
            return taken
        taken = taken.index_fill(0, torch.tensor(curve), choice)


class _Offers:
    """All choices as tensors [curves, choices], short curves filled up with what nobody takes.

    What is taken is a tensor [curves]: the index of a choice, or -1 where another way is gone.
    """

    def __init__(self, curves: list[Ways]) -> None:
        ways = [way for group in curves for way in group]
        self.curves = [curve for way in ways for curve in way]
        longest = max(map(len, self.curves))

        def table(value: Callable[[Choice], float], rest: float) -> Tensor:
            rows = [[*map(value, curve), *[rest] * (longest - len(curve))] for curve in self.curves]
            return torch.tensor(rows, dtype=torch.float64)

        self.cost, self.bytes = table(lambda c: c.cost, 0.0), table(lambda c: c.bytes, 0.0)
        self.error = table(lambda c: c.error, math.inf)
        self.way = torch.tensor([i for i, way in enumerate(ways) for _ in way])
        count, number = max(map(len, curves)), iter(range(len(ways)))
        self.ways = torch.tensor(
            [[next(number) if i < len(group) else len(ways) for i in range(count)] for group in curves]
        )

    def taken(self, price: float, rent: float) -> Tensor:
        value, choice = (self.error + price * self.cost + rent * self.bytes).min(1)
        # one more way, that nobody goes, where a group has fewer than another
        total = torch.zeros(int(self.way[-1]) + 2, dtype=torch.float64).index_add(0, self.way, value)
        total[-1] = math.inf
        best = self.ways.gather(1, total[self.ways].argmin(1, keepdim=True))
        return torch.where(torch.isin(self.way, best), choice, -1)

    def cost_of(self, taken: Tensor) -> float:
        return self._sum(self.cost, taken)

    def bytes_of(self, taken: Tensor) -> float:
        return self._sum(self.bytes, taken)

    def best_step(self, taken: Tensor, rest: float, room: float) -> tuple[int, int, float]:
        """Curve, choice and gain of the step that lowers the error most, within what is left over."""
        now = taken.clamp_min(0)[:, None]
        fits = (self.cost - self.cost.gather(1, now) <= rest) & (
            self.bytes - self.bytes.gather(1, now) <= room
        )
        gains = torch.where(fits & (taken >= 0)[:, None], self.error.gather(1, now) - self.error, -math.inf)
        best = int(gains.argmax())
        return best // gains.shape[1], best % gains.shape[1], float(gains.flatten()[best])

    def choices(self, taken: Tensor) -> list[Choice]:
        return [curve[i] for curve, i in zip(self.curves, taken.tolist(), strict=True) if i >= 0]

    @staticmethod
    def _sum(table: Tensor, taken: Tensor) -> float:
        return float(table.gather(1, taken.clamp_min(0)[:, None])[taken >= 0].sum())
