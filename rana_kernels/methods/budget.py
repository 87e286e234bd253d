"""One budget for a whole model: where a multiply-add saves the most loss.

Every way to adapt a linear, at every cost, has an error: what its output is off by, each output
weighed by how the loss depends on it, so that errors of all linears are in one currency. Which kind of
adapter a linear gets, whether q, k and v or up and gate share their ranks, and what stays dense is not
decided by a rule: at a price for a multiply-add each linear takes what is cheapest in error plus cost,
and the price is the one at which the model fits the budget. (A Lagrange multiplier finds points on the
convex hulls of all curves at once: Shoham and Gersho, "Efficient bit allocation", 1988.)

Errors of rank adapters are dropped energies, which is what they are. A neuron adapter's are measured,
because the neurons it drops add up: their scores leave the cross terms out and flatter it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import track

from rana_kernels.calibrate import Stats
from rana_kernels.layer import Layer
from rana_kernels.methods.adapters import dense_adapter, make_adapter
from rana_kernels.methods.split import RANK_STEP, ROUNDING, Splits, smallest_budget
from rana_kernels.models import find_blocks
from rana_kernels.plan import Adapter, Plan

SHARES = tuple(i / 48 for i in range(1, 48))  # of the dense cost: where the curves are taken
ERROR_TOKENS = 1024  # of the sample, for errors that are measured


@dataclass(frozen=True)
class Choice:
    """One way to adapt some linears: multiply-adds a token, and error in the metric of the loss."""

    cost: float
    error: float
    adapters: tuple[Adapter, ...]


Curve = list[Choice]


def plan_model(stats: Stats, flops_reduction: float, progress: bool = True) -> Plan:
    """The plan of least loss; `compress` fills its thresholds in. ValueError for a reduction out of reach."""
    if not 0 < flops_reduction < 1:
        raise ValueError(f"flops_reduction is {flops_reduction}, wanted more than 0 and less than 1")
    return plan_curves(stats, model_curves(stats, progress), flops_reduction)


def model_curves(stats: Stats, progress: bool = True) -> list[Curve]:
    """The curves of every block, which serve any budget. Holds the factors of one block at a time."""
    curves: list[Curve] = []
    for block in track(find_blocks(stats.model), "planning", disable=not progress, transient=True):
        curves += block_curves(Layer(stats.model, block, stats))
    return curves


def plan_curves(stats: Stats, curves: list[Curve], flops_reduction: float) -> Plan:
    dense = sum(adapter.dense_flops / 2 for curve in curves for adapter in curve[0].adapters)
    chosen = spend(curves, (1 - flops_reduction) * dense)
    if chosen is None:
        least = sum(min(choice.cost for choice in curve) for curve in curves)
        raise ValueError(
            f"flops_reduction is {flops_reduction}, wanted more than 0 and at most "
            f"{int(1000 * (1 - least / dense)) / 1000}"
        )
    by_name = {name: a for choice in chosen for a in choice.adapters for name in a.names}
    ordered = dict.fromkeys(by_name[name] for block in find_blocks(stats.model) for name in block.linears)
    return Plan(tuple(ordered), "global", flops_reduction)


def spend(curves: list[Curve], budget: float) -> list[Choice] | None:
    """A point of each curve, of least error together at a cost of at most `budget`; None if all cost more."""
    budget *= 1 + ROUNDING
    best = [min(curve, key=lambda choice: choice.cost) for curve in curves]
    if _cost(best) > budget:
        return None
    # errors per multiply-add span many orders of magnitude: the price is found by its logarithm
    low, high = -200.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        bought = [_bought(curve, 2.0**middle) for curve in curves]
        if _cost(bought) > budget:
            low = middle
        else:
            high, best = middle, bought
    return _spend_rest(curves, best, budget)


def _bought(curve: Curve, price: float) -> Choice:
    """What is taken at a price for a multiply-add."""
    return min(curve, key=lambda choice: choice.error + price * choice.cost)


def _spend_rest(curves: list[Curve], chosen: list[Choice], budget: float) -> list[Choice]:
    """What one price leaves over, on points between those of the hulls: the largest gain that fits first."""
    while True:
        rest = budget - _cost(chosen)
        gains = [
            (now.error - other.error, i, other)
            for i, (curve, now) in enumerate(zip(curves, chosen, strict=True))
            for other in curve
            if other.cost - now.cost <= rest
        ]
        gain, i, other = max(gains, key=lambda g: g[0])
        if gain <= 0:
            return chosen
        chosen = [*chosen[:i], other, *chosen[i + 1 :]]


def _cost(choices: list[Choice]) -> float:
    return sum(choice.cost for choice in choices)


def block_curves(layer: Layer) -> list[Curve]:
    """The curves of one block: of q, k and v together or apart, o, up and gate together or apart, down."""
    curves: list[Curve] = []
    for names in layer.block.inputs.values():
        apart = together([_single(layer, name) for name in names])
        curves.append(apart if len(names) == 1 else [*apart, *_ranks(layer, names)])
    return curves


def together(curves: list[Curve]) -> Curve:
    """The best points of several curves under one budget, from the cheapest on: steps by falling slope."""
    if len(curves) == 1:
        return curves[0]
    hulls = [_hull(curve) for curve in curves]
    steps = sorted(
        (slope, i, place)
        for i, hull in enumerate(hulls)
        for place, slope in enumerate(map(_slope, hull, hull[1:]), 1)
    )
    at = [hull[0] for hull in hulls]
    points = [_sum(at)]
    for _, i, place in steps:
        at[i] = hulls[i][place]
        points.append(_sum(at))
    return points


def _hull(curve: Curve) -> Curve:
    """The points of the lower convex hull, by rising cost and falling error."""
    hull: Curve = []
    for choice in sorted(curve, key=lambda c: (c.cost, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.error - a.error) / (b.cost - a.cost) if b.cost > a.cost else -math.inf


def _sum(choices: list[Choice]) -> Choice:
    adapters = tuple(adapter for choice in choices for adapter in choice.adapters)
    return Choice(_cost(choices), sum(choice.error for choice in choices), adapters)


def _single(layer: Layer, name: str) -> Curve:
    return [_dense(layer, name), *_ranks(layer, (name,)), *_neurons(layer, name)]


def _dense(layer: Layer, name: str) -> Choice:
    return Choice(layer.linear(name).weight.numel(), 0.0, (dense_adapter(layer, name),))


def _ranks(layer: Layer, names: tuple[str, ...]) -> Iterator[Choice]:
    """Rank adapters at each cost at which there is one."""
    N, K = layer.weight(names).shape
    splits = Splits(layer.rank_scores(names, "loss"), K, N)
    for share in SHARES:
        if share * K * N < smallest_budget(K, N) or min(K, N) < RANK_STEP:
            continue
        split = splits.best(share * K * N)
        adapter = make_adapter(layer, "rank", names, split.rank, split.live, None, "loss")
        yield Choice(adapter.flops / 2, split.dropped, (adapter,))


def _neurons(layer: Layer, name: str) -> Iterator[Choice]:
    """Neuron adapters, their errors measured on some tokens."""
    x, scale = layer.sample(layer.input_of((name,))), layer.scale(name, "loss")
    some, weight = x[:: -(-len(x) // ERROR_TOKENS)], layer.weighted((name,), "loss")
    scores, ordered = some.abs() * scale, (x.abs() * scale).flatten().sort(descending=True).values
    for share in SHARES:
        threshold = ordered[min(round(share * len(ordered)), len(ordered) - 1)]
        error = torch.where(scores < threshold, some, 0) @ weight.T
        adapter = make_adapter(layer, "neuron", (name,), x.shape[1], share * x.shape[1], None, "loss")
        mean = float(error.square().sum(dtype=torch.float64)) / len(some)
        yield Choice(adapter.flops / 2, mean, (adapter,))
