"""The spending of a budget: one choice for every linear, so that the sum of the errors is least.

Every unit of cost gets a price. At a given price each linear takes the choice of least error + price · cost.
A bisection finds the lowest price at which the whole model is within the budget. The price is a Lagrange
multiplier, which finds points on the convex hulls of all curves at once (Shoham and Gersho, "Efficient bit
allocation", 1988). A limit on memory adds a second multiplier, the rent of a stored byte; the price is found
again for every rent.
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
    """One adapter, its cost a token, the bytes that it stores, and its error in the metric of the loss."""

    cost: float
    bytes: int
    error: float
    adapter: AdapterSpec


Curve = list[Choice]
# The ways to adapt the linears that read one input, such as each alone or all jointly. Exactly one way is
# taken, with one choice from each of its curves.
Ways = list[list[Curve]]
# The bisections run between these powers of two, because errors span many orders of magnitude.
PRICES, RENTS = (-200.0, 200.0), (-200.0, 100.0)
STEPS = 60  # of a bisection


def spend(curves: list[Ways], budget: float, max_memory: float | None = None) -> list[Choice] | None:
    """Return the choices of least total error within `budget` and, if given, `max_memory` bytes.

    Returns None if no choices are within both limits.
    """
    offers, budget = _Offers(curves), budget * (1 + ROUNDING)
    room = math.inf if max_memory is None else max_memory
    taken = _at_rent(offers, budget, 0.0)
    if taken is not None and offers.bytes_of(taken) > room:
        taken = _lowest(
            lambda rent: _at_rent(offers, budget, rent), lambda t: offers.bytes_of(t) <= room, RENTS
        )
    return None if taken is None else offers.choices(_spend_rest(offers, taken, budget, room))


def least_cost(curves: list[Ways]) -> float:
    """Return the cost of the cheapest choices for all groups of linears."""
    return sum(min(sum(min(c.cost for c in curve) for curve in way) for way in ways) for ways in curves)


def least_memory(curves: list[Ways], budget: float) -> int | None:
    """Return the fewest bytes stored at a cost of at most `budget`, or None if nothing costs so little."""
    offers = _Offers(curves)
    taken = _at_rent(offers, budget * (1 + ROUNDING), 2.0 ** RENTS[1])
    return None if taken is None else int(offers.bytes_of(taken))


def _at_rent(offers: "_Offers", budget: float, rent: float) -> Tensor | None:
    """Return what is taken at the lowest price that meets the budget, at a given rent."""
    return _lowest(
        lambda price: offers.taken(price, rent), lambda taken: offers.cost_of(taken) <= budget, PRICES
    )


def _lowest(
    taken_at: Callable[[float], Tensor | None], fits: Callable[[Tensor], bool], powers: tuple[float, float]
) -> Tensor | None:
    """Bisect for the lowest price at which `taken_at(price)` fits and return that; None if none fits."""
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
    """Spend the rest of the budget on choices between the points of the hulls, the largest gain first."""
    while True:
        curve, choice, gain = offers.best_step(
            taken, budget - offers.cost_of(taken), room - offers.bytes_of(taken)
        )
        if gain <= 0:
            return taken
        taken = taken.index_fill(0, torch.tensor(curve), choice)


class _Offers:
    """All choices as tensors [curves, choices]. Short curves are padded with choices of infinite error.

    The taken choices are a tensor [curves]: the index of a choice, or -1 for a curve of a way not taken.

    way    [curves]: the number of the way that a curve belongs to
    ways   [groups, ways]: the numbers of each group's ways, padded with a number that no way has
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
        """Return the choices of least error + price · cost + rent · bytes, of the best way of every group."""
        value, choice = (self.error + price * self.cost + rent * self.bytes).min(1)
        # the last total belongs to the padding of `ways`, which must never be the best
        total = torch.zeros(int(self.way[-1]) + 2, dtype=torch.float64).index_add(0, self.way, value)
        total[-1] = math.inf
        best = self.ways.gather(1, total[self.ways].argmin(1, keepdim=True))
        return torch.where(torch.isin(self.way, best), choice, -1)

    def cost_of(self, taken: Tensor) -> float:
        return self._sum(self.cost, taken)

    def bytes_of(self, taken: Tensor) -> float:
        return self._sum(self.bytes, taken)

    def best_step(self, taken: Tensor, rest: float, room: float) -> tuple[int, int, float]:
        """Return curve, choice and gain of the change that lowers the error most within `rest` and `room`."""
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
