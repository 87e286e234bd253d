"""The cost of a compressed model on a text: for each token, and compared with the plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.evaluation.live import LiveCount
from rana_kernels.model.plan import Plan

# If the cost of the live rows differs from the plan by more than this fraction, the text is called different
# from the calibration text. docs/quality.md has the measurements below and above it.
MARGIN = 0.018


@dataclass(frozen=True)
class Costs:
    """The multiply-adds of one token.

    dense   those of the original linears
    fixed   those that do not depend on masks
    row     name of an adapter -> those of one live row of it
    """

    dense: float
    fixed: float
    row: dict[str, int]

    def cost_ratio(self, counts: dict[str, LiveCount]) -> float:
        """Return the measured cost, mean over tokens, as a fraction of the dense cost."""
        return (self.fixed + self._masked({name: count.mean for name, count in counts.items()})) / self.dense

    def cost_ratio_of_tokens(self, counts: dict[str, LiveCount]) -> Tensor:
        """Return the cost of each token as a fraction of the dense cost, float64 [tokens]."""
        masked = [counts[name].per_token.double() * cost for name, cost in self.row.items()]
        return (self.fixed + torch.stack(masked).sum(0)) / self.dense

    def drift(self, counts: dict[str, LiveCount], planned: dict[str, float]) -> float:
        """Return by what fraction the cost of the live rows differs from that of the `planned` live rows."""
        found = self._masked({name: count.mean for name, count in counts.items()})
        return found / self._masked(planned) - 1

    def _masked(self, live: dict[str, float]) -> float:
        """Return the cost of the live rows."""
        return sum(live[name] * cost for name, cost in self.row.items())


def costs_of(plan: Plan) -> Costs:
    """Return the costs of a model compressed by `plan`: a token reads all of B, but only its live rows."""
    adapted = [adapter for adapter in plan.adapters if adapter.kind != "dense"]
    row = {adapter.names[0]: adapter.width for adapter in adapted}
    live = sum(adapter.live * adapter.width for adapter in adapted)
    return Costs(plan.dense_flops / 2, plan.flops / 2 - live, row)


def planned_live(plan: Plan) -> dict[str, float]:
    """Return the planned live rows by the name of each adapter's first linear."""
    return {adapter.names[0]: adapter.live for adapter in plan.adapters if adapter.kind != "dense"}
