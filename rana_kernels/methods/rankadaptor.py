"""`method="rankadaptor"`: one budget for the model, and measurements of where it does the most.

`global` (`budget.py`) knows what an error costs where it is made, not what later layers make of it. Here
each curve's errors are given a weight, the budget is spent by the weighted ones, the plan that comes of it is
put in place and its loss on rows that were held out is measured. Weights of 1 are `global`; which others
are tried is `search.py`'s.

Memory: the model, the factors of all its linears, alone and together (for a Llama two to three times the
weights of its blocks), and one set of modules. Everything is decomposed once.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.progress import track
from torch import Tensor, nn

from rana_kernels.calibrate import Stats
from rana_kernels.evaluation.evaluate import perplexity
from rana_kernels.fill import block_tensors, with_threshold
from rana_kernels.install import check_plan, put, swap
from rana_kernels.layer import Layer
from rana_kernels.methods.budget import block_curves, plan_curves
from rana_kernels.methods.performance import Site
from rana_kernels.methods.request import Request
from rana_kernels.methods.search import Search, best_allocation
from rana_kernels.methods.spend import Ways
from rana_kernels.models import find_blocks, is_described
from rana_kernels.plan import Plan
from rana_kernels.resume import ResumeDir


def plan_by_search(
    stats: Stats,
    request: Request,
    search: Search,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Plan:
    """The plan of least measured loss. ValueError for a request out of reach."""
    model = stats.model
    if is_described(model):
        raise ValueError("method 'rankadaptor' measures perplexity, wanted a model of transformers")
    layers = [Layer(model, block, stats) for block in find_blocks(model)]
    curves = [
        block_curves(layer, request.prices)
        for layer in track(layers, "planning", disable=not progress, transient=True)
    ]
    reference = plan_curves(stats, [ways for block in curves for ways in block], request)
    sites = _sites(layers, curves, reference)

    def plan(allocation: Tensor) -> Plan:
        weights = iter(allocation.exp().tolist())
        weighted = [_weighted(ways, next(weights)) for block in curves for ways in block]
        return plan_curves(stats, weighted, request)

    def measure(allocation: Tensor) -> float:
        with realised(layers, plan(allocation)):
            return _loss(model, search)

    search.anchor = _loss(model, search)
    return plan(best_allocation("keep", sites, measure, search, store, progress))


def _loss(model: nn.Module, search: Search) -> float:
    return perplexity(model, search.held_out, progress=False).nll


def _weighted(ways: Ways, weight: float) -> Ways:
    return [
        [[replace(choice, error=weight * choice.error) for choice in curve] for curve in way] for way in ways
    ]


def _sites(layers: list[Layer], curves: list[list[Ways]], reference: Plan) -> list[Site]:
    """One for each input; its share is that of the errors of the reference plan."""
    errors = [[_error(ways, reference) for ways in block] for block in curves]
    total = math.fsum(map(math.fsum, errors))
    deepest = max(1, len(layers) - 1)
    return [
        Site(role, i / deepest, error / total if total else 1 / sum(map(len, errors)))
        for i, (layer, found) in enumerate(zip(layers, errors, strict=True))
        for role, error in zip(layer.block.inputs, found, strict=True)
    ]


def _error(ways: Ways, plan: Plan) -> float:
    """Of the choices that the plan has."""
    adapters = set(plan.adapters)
    curves = [curve for way in ways for curve in way]
    return sum(next((c.error for c in curve if c.adapter in adapters), 0.0) for curve in curves)


@contextmanager
def realised(layers: list[Layer], plan: Plan) -> Iterator[None]:
    """Within the block, the model of `layers` has the modules of `plan`; after it, its linears again."""
    model = layers[0].model
    planned = check_plan(model, plan)
    dense: dict[str, nn.Module] = {}
    try:
        for layer, (block, adapters) in zip(layers, planned, strict=True):
            # all of a block's tensors before any of its linears is replaced: they are made from those
            complete = [with_threshold(layer, adapter) for adapter in adapters]
            tensors = block_tensors(layer, complete)
            names = (*([block.mlp] if block.mlp else []), *block.linears)
            dense |= {name: model.get_submodule(name) for name in names}
            put(model, block, complete, tensors)
        yield
    finally:
        swap(model, dense)
