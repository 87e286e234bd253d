"""The cost of an adapter for one token in the unit of a budget: multiply-adds, bytes or microseconds.

The cost is linear in the stored rows (a token reads all of B) and in the live rows. One multiply-add reads
one element of a weight, so in one format of weights a budget of FLOPs also limits the bytes that a token
reads. `latency.py` has the microseconds.
"""

from dataclasses import dataclass
from typing import Protocol

from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.format import Format

VECTOR = 4  # bytes of a threshold or a norm
ROUNDING = 1e-9  # relative: rounding must not put a budget that is exactly at a limit past it


@dataclass(frozen=True)
class LinearCost:
    """The cost of one token as a line: `fixed + stored · stored rows + live · live rows`."""

    fixed: float
    stored: float
    live: float

    def at(self, rank: float, live: float) -> float:
        return self.fixed + self.stored * rank + self.live * live


class CostModel(Protocol):
    """A unit of cost: it gives the cost of one token in linears K → N, dense or adapted."""

    def dense(self, in_features: int, width: int) -> float: ...

    def rank(self, in_features: int, width: int) -> LinearCost: ...

    def neuron(self, in_features: int, width: int) -> LinearCost: ...


class MultiplyAdds:
    """Half the FLOPs: R·K + live·N for a rank adapter, live·N for a neuron adapter, K·N for a dense one."""

    def dense(self, in_features: int, width: int) -> float:
        return in_features * width

    def rank(self, in_features: int, width: int) -> LinearCost:
        return LinearCost(0, in_features, width)

    def neuron(self, in_features: int, width: int) -> LinearCost:
        return LinearCost(0, 0, width)


MULTIPLY_ADDS = MultiplyAdds()


@dataclass(frozen=True)
class BytesRead:
    """The bytes that a token reads of weights in `format`, their scales, and thresholds and norms.

    Biases are left out: a token reads them whatever is chosen. `itemsize` is that of the model's floats.
    """

    format: Format
    itemsize: int

    def dense(self, in_features: int, width: int) -> float:
        return width * self.format.row_bytes(in_features, self.itemsize)

    def rank(self, in_features: int, width: int) -> LinearCost:
        stored = self.format.row_bytes(in_features, self.itemsize) + VECTOR
        return LinearCost(0, stored, self.format.for_ranks.row_bytes(width, self.itemsize))

    def neuron(self, in_features: int, width: int) -> LinearCost:
        row = self.format.for_rows(width).row_bytes(width, self.itemsize)
        return LinearCost(2 * VECTOR * in_features, 0, row)


def cost(model: CostModel, adapter: AdapterSpec) -> float:
    """Return the cost of one token in `adapter`."""
    if adapter.kind == "dense":
        return model.dense(adapter.in_features, adapter.width)
    line = (model.rank if adapter.kind == "rank" else model.neuron)(adapter.in_features, adapter.width)
    return line.at(adapter.rank, adapter.live)


def dense_cost(model: CostModel, adapter: AdapterSpec) -> float:
    """Return the cost of one token in the dense linears that `adapter` covers, each run alone."""
    return sum(model.dense(adapter.in_features, width) for width in adapter.out_features)


def reduction(model: CostModel, plan: Plan) -> float:
    """Return the saving of a plan, as a fraction of the cost of the dense linears of the blocks."""
    costs = sum(cost(model, adapter) for adapter in plan.adapters)
    return 1 - costs / sum(dense_cost(model, adapter) for adapter in plan.adapters)
