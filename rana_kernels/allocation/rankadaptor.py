"""`method="rankadaptor"`: one budget for the model, and a search that measures the loss of several plans.

`global` (`whole_model.py`) estimates the errors of all linears one by one. It does not know how later blocks
change the effect of an error. Here the errors of every input get a weight, the budget is spent by the
weighted errors, and the plan is installed to measure its loss on held-out token ids. With all weights 1 the
plan is that of `global`; `search.py` chooses the other weights.

Memory: the model, the factors of all its linears, alone and joint (for a Llama two to three times the weights
of its blocks), and one set of modules. Every decomposition is computed once.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from rana_kernels.allocation.curves import block_curves
from rana_kernels.allocation.loss_model import InputShare
from rana_kernels.allocation.method import Chooser, Method, chooser_of
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.search import Search, best_allocation
from rana_kernels.allocation.spending import Ways
from rana_kernels.allocation.whole_model import plan_curves
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.evaluation.metrics import perplexity
from rana_kernels.model.architectures import is_described
from rana_kernels.model.install import install_block, replace_modules
from rana_kernels.model.plan import Plan
from rana_kernels.nn.format import FLOAT
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.tensors import block_tensors, with_threshold
from rana_kernels.system.progress import track


class RankAdaptor(Method):
    name = "rankadaptor"
    summary = "one budget for the whole model, corrected by measurements"
    needs = {"inputs": ("qkv", "o", "mlp", "down"), "gradients": True}
    any_budget = True
    searches = True

    def prepare(
        self, stats: Stats, request: Request, store: ResumeDir | None = None, progress: bool = True
    ) -> Chooser:
        assert request.search is not None, "make_request sees to it"
        return chooser_of(plan_by_search(stats, request, request.search, store, progress))


def plan_by_search(
    stats: Stats,
    request: Request,
    search: Search,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Plan:
    """Return the plan of least measured loss. Raise ValueError for a request out of reach."""
    model = stats.model
    if is_described(model):
        raise ValueError("method 'rankadaptor' measures perplexity, wanted a model of transformers")
    calibrated = [CalibratedBlock(model, block, stats) for block in stats.blocks]
    curves = [block_curves(block, request.pricing) for block in track(calibrated, "planning", progress)]
    reference = plan_curves(stats, [ways for block in curves for ways in block], request)
    shares = _error_shares(calibrated, curves, reference)

    def plan(allocation: Tensor) -> Plan:
        weights = iter(allocation.exp().tolist())
        weighted = [_weighted(ways, next(weights)) for block in curves for ways in block]
        return plan_curves(stats, weighted, request)

    def measure(allocation: Tensor) -> float:
        with installed(calibrated, plan(allocation)):
            return _loss(model, search)

    search.baseline_loss = _loss(model, search)
    return plan(best_allocation("cost", shares, measure, search, store, progress))


def _loss(model: nn.Module, search: Search) -> float:
    return perplexity(model, search.held_out, progress=False).nll


def _weighted(ways: Ways, weight: float) -> Ways:
    return [
        [[replace(choice, error=weight * choice.error) for choice in curve] for curve in way] for way in ways
    ]


def _error_shares(
    calibrated: list[CalibratedBlock], curves: list[list[Ways]], reference: Plan
) -> list[InputShare]:
    """Return an InputShare for each input: `share` is its part of the errors of the reference plan."""
    errors = [[_error(ways, reference) for ways in block] for block in curves]
    total = math.fsum(map(math.fsum, errors))
    deepest = max(1, len(calibrated) - 1)
    return [
        InputShare(name, i / deepest, error / total if total else 1 / sum(map(len, errors)))
        for i, (block, found) in enumerate(zip(calibrated, errors, strict=True))
        for name, error in zip(block.block.inputs, found, strict=True)
    ]


def _error(ways: Ways, plan: Plan) -> float:
    """Return the error that `ways` has for the adapters in `plan`."""
    adapters = set(plan.adapters)
    curves = [curve for way in ways for curve in way]
    return sum(next((c.error for c in curve if c.adapter in adapters), 0.0) for curve in curves)


@contextmanager
def installed(calibrated: list[CalibratedBlock], plan: Plan) -> Iterator[None]:
    """Replace the linears by the modules of `plan`, in floats, and put the linears back at the end."""
    model, choose = calibrated[0].model, chooser_of(plan)
    dense: dict[str, nn.Module] = {}
    try:
        for own in calibrated:
            # All tensors of a block are made before a linear is replaced: they are made from the linears.
            planned = [adapter.with_format(FLOAT) for adapter in choose(own)]
            block, adapters = own.block, [with_threshold(own, adapter) for adapter in planned]
            tensors = block_tensors(own, adapters)
            names = (*([block.mlp] if block.mlp else []), *block.linears)
            dense |= {name: model.get_submodule(name) for name in names}
            install_block(model, block, adapters, tensors)
        yield
    finally:
        replace_modules(model, dense)
