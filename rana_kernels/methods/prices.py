"""What an adapter costs, in the unit of a budget: multiply-adds, or microseconds (`times.py`).

The cost of a token is a line: so much for every row that is stored and read whatever the mask says, so much
for every live one. The bytes read for one token are multiply-adds times the size of an element, so a budget
of FLOPs is one of those bytes too.
"""

from dataclasses import dataclass
from typing import Protocol

from rana_kernels.plan import Adapter, Plan


@dataclass(frozen=True)
class Line:
    """The cost of a token: `fixed + stored · R + live · rows that are kept`."""

    fixed: float
    stored: float
    live: float

    def at(self, rank: float, live: float) -> float:
        return self.fixed + self.stored * rank + self.live * live


class Prices(Protocol):
    """Costs of linears K → N in one unit, for one token."""

    def dense(self, in_features: int, width: int) -> float: ...

    def rank(self, in_features: int, width: int) -> Line: ...

    def neuron(self, in_features: int, width: int) -> Line: ...


class MultiplyAdds:
    """Half the FLOPs: R·K + live·N of a rank adapter, live·N of a neuron adapter, K·N dense."""

    def dense(self, in_features: int, width: int) -> float:
        return in_features * width

    def rank(self, in_features: int, width: int) -> Line:
        return Line(0, in_features, width)

    def neuron(self, in_features: int, width: int) -> Line:
        return Line(0, 0, width)


MULTIPLY_ADDS = MultiplyAdds()


def cost(prices: Prices, adapter: Adapter) -> float:
    if adapter.kind == "dense":
        return prices.dense(adapter.in_features, adapter.width)
    line = (prices.rank if adapter.kind == "rank" else prices.neuron)(adapter.in_features, adapter.width)
    return line.at(adapter.rank, adapter.live)


def dense_cost(prices: Prices, adapter: Adapter) -> float:
    """Of the linears that it covers, each on its own."""
    return sum(prices.dense(adapter.in_features, width) for width in adapter.out_features)


def reduction(prices: Prices, plan: Plan) -> float:
    """What a plan saves, as a fraction of what the dense linears of the blocks cost in the same unit."""
    costs = sum(cost(prices, adapter) for adapter in plan.adapters)
    return 1 - costs / sum(dense_cost(prices, adapter) for adapter in plan.adapters)
