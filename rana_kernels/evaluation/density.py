"""How much of a model's work its masks let through: token by token, and against what was planned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.evaluation.live import LiveCount
from rana_kernels.model.plan import Plan

# By how much, of what the plan says, the rows that are kept may differ before the text is called another
# kind than the calibration's: docs/quality.md has the measurements between which it lies.
MARGIN = 0.018


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a token: `fixed` ones, and `row[name]` for each row that the adapter `name` keeps.
    `dense`: those of the linears before anything was adapted."""

    dense: float
    fixed: float
    row: dict[str, int]

    def cost_ratio(self, counts: dict[str, LiveCount]) -> float:
        """Measured cost, mean over tokens, as a fraction of the dense cost."""
        return (self.fixed + self._masked({name: count.mean for name, count in counts.items()})) / self.dense

    def cost_ratio_of_tokens(self, counts: dict[str, LiveCount]) -> Tensor:
        """float64 [tokens]: the cost of each token, as a fraction of the dense cost."""
        kept = [counts[name].per_token.double() * cost for name, cost in self.row.items()]
        return (self.fixed + torch.stack(kept).sum(0)) / self.dense

    def drift(self, counts: dict[str, LiveCount], planned: dict[str, float]) -> float:
        """By what fraction the rows kept differ from `planned` means, each weighing what it costs."""
        found = self._masked({name: count.mean for name, count in counts.items()})
        return found / self._masked(planned) - 1

    def _masked(self, live: dict[str, float]) -> float:
        return sum(live[name] * cost for name, cost in self.row.items())


def costs_of(plan: Plan) -> Costs:
    """Of a model compressed by `plan`: B is paid by every token, rows by those that keep them."""
    adapted = [adapter for adapter in plan.adapters if adapter.kind != "dense"]
    row = {adapter.names[0]: adapter.width for adapter in adapted}
    live = sum(adapter.live * adapter.width for adapter in adapted)
    return Costs(plan.dense_flops / 2, plan.flops / 2 - live, row)


def planned_live(plan: Plan) -> dict[str, float]:
    """Mean kept rows by the name of the adapter's first linear."""
    return {adapter.names[0]: adapter.live for adapter in plan.adapters if adapter.kind != "dense"}
