"""Every method, as a function from a budget to a candidate: a model, and what its tokens cost.

A budget is a fraction of the multiply-adds of the linears in a scope: both, mlp or attention. What a
method leaves dense there counts, and so does B. A budget that a method cannot meet is a ValueError.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import rana_kernels as rana
from bench.quality.masks import mask_gates, mask_inputs
from bench.quality.subject import Subject, scoped
from rana_kernels.allocation.methods import METHODS
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.search import Search
from rana_kernels.allocation.specs import dense_spec
from rana_kernels.allocation.spending import Curve, Ways
from rana_kernels.allocation.whole_model import plan_curves
from rana_kernels.evaluation.density import Costs, costs_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats

EVALUATIONS = 20  # of a search of rankadaptor


@dataclass
class Candidate:
    """A model that skips work. `plan` and `stats` where it has adapters: those can be trained further."""

    model: nn.Module
    costs: Costs
    plan: Plan | None = None
    stats: Stats | None = None


def static(subject: Subject, scope: str, keep: float) -> Candidate:
    return _compressed(subject, scope, _same_for_every_layer(subject, scope, keep, "static"))


def teal(subject: Subject, scope: str, keep: float) -> Candidate:
    return Candidate(*mask_inputs(subject, scope, keep, weighted=False))


def wina(subject: Subject, scope: str, keep: float) -> Candidate:
    return Candidate(*mask_inputs(subject, scope, keep, weighted=True))


def cats(subject: Subject, scope: str, keep: float) -> Candidate:
    return Candidate(*mask_gates(subject, scope, keep))


def as_published(subject: Subject, scope: str, keep: float) -> Candidate:
    return _compressed(subject, scope, _same_for_every_layer(subject, scope, keep, "paper"))


def one_budget(subject: Subject, scope: str, keep: float) -> Candidate:
    return _spent(subject, scope, keep, subject.curves)


def without_masks(subject: Subject, scope: str, keep: float) -> Candidate:
    """What of `global` is not due to masks: its metric, its budget and its joint decompositions."""
    curves = [[[_always_on(curve) for curve in way] for way in ways] for ways in subject.curves]
    return _spent(subject, scope, keep, curves)


def _spent(subject: Subject, scope: str, keep: float, every_curve: list[Ways]) -> Candidate:
    inside = subject.linears(scope)
    curves = [_within(ways, inside) for ways in every_curve]
    # the curves' own budget is over all linears
    every = [curve[0].adapter for ways in curves for curve in ways[0]]
    total = sum(adapter.dense_flops for adapter in every)
    part = sum(adapter.dense_flops for adapter in every if adapter.names[0] in inside)
    request = Request("global", flops_reduction=(1 - keep) * part / total)
    return _compressed(subject, scope, plan_curves(subject.stats, curves, request))


def by_search(subject: Subject, scope: str, keep: float) -> Candidate:
    """Measures on rows that its statistics do not have. `scope` is "both": see `WHOLE`."""
    part, held_out = subject.searched
    search = Search(held_out, EVALUATIONS)
    plan = rana.plan(
        part.stats, flops_reduction=1 - keep, method="rankadaptor", search=search, progress=False
    )
    return _compressed(part, scope, plan)


CONTENDERS: dict[str, Callable[[Subject, str, float], Candidate]] = {
    "static": static,
    "teal": teal,
    "wina": wina,
    "cats": cats,
    "paper": as_published,
    "unmasked": without_masks,
    "global": one_budget,
    "rankadaptor": by_search,
}

WHOLE = ("rankadaptor",)  # measure what a whole model loses: no scope but "both"


def _compressed(subject: Subject, scope: str, plan: Plan) -> Candidate:
    model, stats = subject.copy()
    plan = rana.compress(model, plan=plan, stats=stats, progress=False).plan
    return Candidate(model, costs_of(_part(plan, subject.linears(scope))), plan, stats)


def _part(plan: Plan, names: set[str]) -> Plan:
    return plan.with_adapters(tuple(a for a in plan.adapters if a.names[0] in names))


def _same_for_every_layer(subject: Subject, scope: str, keep: float, method: str) -> Plan:
    """The adapted linears take the cut of o too, which stays dense."""
    cost = {name: subject.dense.get_submodule(name).weight.numel() for name in subject.linears(scope)}
    adapted = sum(cost.values()) - sum(cost.get(block.o, 0) for block in subject.blocks)
    share = 1 - (1 - keep) * sum(cost.values()) / adapted
    if share <= 0:
        raise ValueError(
            f"{method} leaves {1 - adapted / sum(cost.values()):.2f} of the cost dense, wanted {keep}"
        )
    adapters: list[AdapterSpec] = []
    for block in subject.blocks:
        calibrated = CalibratedBlock(subject.dense, block, subject.stats)
        inside = set(scoped(block, scope))
        for adapter in METHODS[method].plan_block(calibrated, share):
            own = adapter.names[0] in inside
            adapters += [adapter] if own else [dense_spec(calibrated, name) for name in adapter.names]
    return Plan(tuple(adapters), method)


def _within(ways: Ways, names: set[str]) -> Ways:
    """The ways, or only dense linears where they are out of scope."""
    if ways[0][0][0].adapter.names[0] in names:
        return ways
    return [[curve[:1] for curve in ways[0]]]


def _always_on(curve: Curve) -> Curve:
    """The choices that keep every row they store."""
    return [c for c in curve if c.adapter.kind == "dense" or c.adapter.live == c.adapter.rank]
