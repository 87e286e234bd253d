"""The cost of an adapter in the unit of a budget: multiply-adds, or microseconds (`latency.py`).

The cost of a token is linear: every stored row that is read whatever the mask says has a cost, and every live
row has one. A token reads as many bytes as it has multiply-adds, times the size of an element, so a budget of
FLOPs is a budget of these bytes too.
"""

from dataclasses import dataclass
from typing import Protocol

from rana_kernels.model.plan import AdapterSpec, Plan

ROUNDING = 1e-9  # arithmetic may carry a budget that is exactly at a limit this far past it


@dataclass(frozen=True)
class LinearCost:
    """The cost of a token: `fixed + stored · R + live · rows that are kept`."""

    fixed: float
    stored: float
    live: float

    def at(self, rank: float, live: float) -> float:
        return self.fixed + self.stored * rank + self.live * live


class CostModel(Protocol):
    """Costs of linears K → N in one unit, for one token."""

    def dense(self, in_features: int, width: int) -> float: ...

    def rank(self, in_features: int, width: int) -> LinearCost: ...

    def neuron(self, in_features: int, width: int) -> LinearCost: ...


class MultiplyAdds:
    """Half the FLOPs: R·K + live·N of a rank adapter, live·N of a neuron adapter, K·N dense."""

    def dense(self, in_features: int, width: int) -> float:
        return in_features * width

    def rank(self, in_features: int, width: int) -> LinearCost:
        return LinearCost(0, in_features, width)

    def neuron(self, in_features: int, width: int) -> LinearCost:
        return LinearCost(0, 0, width)


MULTIPLY_ADDS = MultiplyAdds()


def cost(model: CostModel, adapter: AdapterSpec) -> float:
    """Return what one token costs in `adapter`."""
    if adapter.kind == "dense":
        return model.dense(adapter.in_features, adapter.width)
    line = (model.rank if adapter.kind == "rank" else model.neuron)(adapter.in_features, adapter.width)
    return line.at(adapter.rank, adapter.live)


def dense_cost(model: CostModel, adapter: AdapterSpec) -> float:
    """Return what one token costs in the dense linears that `adapter` covers, each on its own."""
    return sum(model.dense(adapter.in_features, width) for width in adapter.out_features)


def reduction(model: CostModel, plan: Plan) -> float:
    """Return what a plan saves, as a fraction of the cost of the dense linears of the blocks."""
    costs = sum(cost(model, adapter) for adapter in plan.adapters)
    return 1 - costs / sum(dense_cost(model, adapter) for adapter in plan.adapters)
