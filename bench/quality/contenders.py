"""Every method, as a function from a budget to a candidate: a model, and the costs of its tokens.

A budget is a fraction of the multiply-adds of the linears in a scope: both, mlp or attention. B counts, and
so do linears of the scope that a method leaves dense. Methods raise ValueError for a budget that they cannot
meet.
"""

from collections.abc import Callable
from functools import partial

import rana_kernels as rana
from bench.quality.masks import mask_gates, mask_greedily, mask_inputs
from bench.quality.subject import Candidate, Subject, rotated_subject, scoped
from rana_kernels.allocation.methods import METHODS
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.search import Search
from rana_kernels.allocation.specs import dense_spec
from rana_kernels.allocation.spending import Curve, Ways
from rana_kernels.allocation.whole_model import plan_curves
from rana_kernels.evaluation.density import costs_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.block import CalibratedBlock

EVALUATIONS = 20  # allocations that rankadaptor measures


def uniform(subject: Subject, scope: str, cost_ratio: float, *, method: str) -> Candidate:
    return _compressed(subject, scope, _same_for_every_layer(subject, scope, cost_ratio, method))


def one_budget(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
    return _spent(subject, scope, cost_ratio, subject.curves)


def rotated(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
    """Compress by `global` after a rotation of the dense model."""
    return one_budget(rotated_subject(subject), scope, cost_ratio)


def without_masks(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
    """Compress by `global` without masks: with its metric, its budget and its joint decompositions alone."""
    curves = [[[_always_on(curve) for curve in way] for way in ways] for ways in subject.curves]
    return _spent(subject, scope, cost_ratio, curves)


def _spent(subject: Subject, scope: str, cost_ratio: float, every_curve: list[Ways]) -> Candidate:
    inside = subject.linears(scope)
    curves = [_within(ways, inside) for ways in every_curve]
    # the budget of the curves counts all linears, also those out of scope
    every = [curve[0].adapter for ways in curves for curve in ways[0]]
    total = sum(adapter.dense_flops for adapter in every)
    part = sum(adapter.dense_flops for adapter in every if adapter.names[0] in inside)
    request = Request("global", flops_reduction=(1 - cost_ratio) * part / total)
    return _compressed(subject, scope, plan_curves(subject.stats, curves, request))


def by_search(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
    """Search with measurements on held-out text. `scope` must be "both": see `WHOLE`."""
    part, held_out = subject.searched
    search = Search(held_out, EVALUATIONS)
    plan = rana.plan(
        part.stats, flops_reduction=1 - cost_ratio, method="rankadaptor", search=search, progress=False
    )
    return _compressed(part, scope, plan)


CONTENDERS: dict[str, Callable[[Subject, str, float], Candidate]] = {
    "static": partial(uniform, method="static"),
    "teal": partial(mask_inputs, weighted=False),
    "teal-greedy": mask_greedily,
    "wina": partial(mask_inputs, weighted=True),
    "cats": mask_gates,
    "paper": partial(uniform, method="paper"),
    "unmasked": without_masks,
    "global": one_budget,
    "rotated": rotated,
    "rankadaptor": by_search,
}

WHOLE = ("teal-greedy", "rotated", "rankadaptor")  # these concern whole models, so their only scope is "both"


def _compressed(subject: Subject, scope: str, plan: Plan) -> Candidate:
    model, stats = subject.copy()
    report = rana.compress(model, plan=plan, stats=stats, progress=False)
    costs = costs_of(_part(report.plan, subject.linears(scope)))
    return Candidate(model, costs, subject.dense, report)


def _part(plan: Plan, names: set[str]) -> Plan:
    return plan.with_adapters(tuple(a for a in plan.adapters if a.names[0] in names))


def _same_for_every_layer(subject: Subject, scope: str, cost_ratio: float, method: str) -> Plan:
    """Plan every layer alike. o stays dense, and the adapted linears save its part too."""
    cost = {name: subject.dense.get_submodule(name).weight.numel() for name in subject.linears(scope)}
    adapted = sum(cost.values()) - sum(cost.get(block.o, 0) for block in subject.blocks)
    share = 1 - (1 - cost_ratio) * sum(cost.values()) / adapted
    if share <= 0:
        raise ValueError(
            f"{method} leaves {1 - adapted / sum(cost.values()):.2f} of the cost dense, wanted {cost_ratio}"
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
    """Return the ways, or only dense linears if they are out of scope."""
    if ways[0][0][0].adapter.names[0] in names:
        return ways
    return [[curve[:1] for curve in ways[0]]]


def _always_on(curve: Curve) -> Curve:
    """Return the choices that keep every stored row for every token."""
    return [c for c in curve if c.adapter.kind == "dense" or c.adapter.live == c.adapter.rank]
