"""The dial: it changes the budget of a compressed model by other thresholds, with the same weights.

A neuron adapter drops the inputs whose scores are below its threshold. Its weights serve every threshold, so
a plan can hold the masks of several budgets: each neuron adapter has one `Setting` for each of them
(`allocation/dial.py` chooses them). Between two settings, thresholds and live rows are interpolated. The
masks of rank adapters stay.
"""

from bisect import bisect_left
from dataclasses import replace
from typing import cast

from torch import nn

from rana_kernels.model.install import plan_for
from rana_kernels.model.plan import AdapterSpec, Plan, Setting
from rana_kernels.nn.base import AdapterModule


def cost_ratios(plan: Plan) -> list[float]:
    """Return the cost ratio of each setting, lowest first. A plan without a dial has none.

    A cost ratio is the multiply-adds of the blocks' linears as a fraction of the dense ones, expected on the
    calibration text.
    """
    count = max((len(adapter.settings) for adapter in plan.adapters), default=0)
    return [1 - _with_settings(plan, i, i, 0.0).reduction for i in range(count)]


def at_budget(plan: Plan, cost_ratio: float) -> Plan:
    """Return the plan with the masks for `cost_ratio`.

    Raises ValueError if the plan has no dial, or for a cost ratio that its dial does not reach.
    """
    ratios = cost_ratios(plan)
    if not ratios:
        raise ValueError(
            f"cost_ratio is {cost_ratio} and the plan has no other masks, wanted one made by method 'global'"
        )
    # the reduction in the plan of a setting is rounded, and so is what a user types after reading it
    if not round(ratios[0], 3) <= round(cost_ratio, 3) <= round(ratios[-1], 3):
        raise ValueError(
            f"cost_ratio is {cost_ratio}, wanted {ratios[0]:.3f} to {ratios[-1]:.3f}: what the weights of "
            "this plan can serve"
        )
    upper = min(max(1, bisect_left(ratios, cost_ratio)), len(ratios) - 1)
    lower = max(upper - 1, 0)
    width = ratios[upper] - ratios[lower]
    share = (cost_ratio - ratios[lower]) / width if width > 0 else 0.0
    return _with_settings(plan, lower, upper, min(max(share, 0.0), 1.0))


def set_masks(model: nn.Module, plan: Plan) -> None:
    """Give the neuron adapters of `model` that have settings the thresholds of `plan`, in place."""
    for adapter in plan_for(model, plan).all_adapters:
        if adapter.settings:
            assert adapter.threshold is not None, "a compressed model has all thresholds"
            mask_owner(model, adapter).set_threshold(adapter.threshold)


def mask_owner(model: nn.Module, adapter: AdapterSpec) -> AdapterModule:
    """Return the module that holds the thresholds of an adapter: its own, or the RanaMLP around it."""
    name = adapter.names[0]
    own = cast(AdapterModule, model.get_submodule(name))
    return own if own.has_threshold else cast(AdapterModule, model.get_submodule(name.rpartition(".")[0]))


def _with_settings(plan: Plan, lower: int, upper: int, share: float) -> Plan:
    """Return the plan with the masks at `share` of the way between two settings."""

    def moved(adapter: AdapterSpec) -> AdapterSpec:
        if not adapter.settings:
            return adapter
        low, high = adapter.settings[lower], adapter.settings[upper]
        return replace(adapter, **_between(low, high, share)._asdict())

    head = None if plan.lm_head is None else moved(plan.lm_head)
    return replace(plan, adapters=tuple(map(moved, plan.adapters)), lm_head=head)


def _between(low: Setting, high: Setting, share: float) -> Setting:
    live = low.live + share * (high.live - low.live)
    if low.threshold is None or high.threshold is None:
        return Setting(live)
    return Setting(live, low.threshold + share * (high.threshold - low.threshold))
