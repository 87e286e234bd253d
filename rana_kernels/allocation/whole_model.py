"""`method="global"`: one budget for the whole model, spent where it saves the most loss.

Every adapter has an estimated error: the squared error of its outputs, each output weighted by how strongly
the loss depends on it. Therefore the errors of different linears can be compared and added. No rule decides
which kind of adapter a linear gets, whether linears share their ranks, or which linears stay dense:
`spending.py` finds the choices of least total error.

The error of a rank adapter is exactly the energy that it drops. The error of a neuron adapter is measured,
because the errors of dropped neurons add up: a sum of their scores leaves out the cross terms.

Several linears that read one input may share the mask of a joint neuron adapter. It costs the same FLOPs as
separate ones, but it is one call. Therefore it is preferred if its error is at most 1 % larger.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.progress import track
from torch import Tensor, nn

from rana_kernels.allocation.cost import MULTIPLY_ADDS, CostModel, cost
from rana_kernels.allocation.method import Chooser, Method, chooser_of
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.specs import dense_spec, make_spec
from rana_kernels.allocation.spending import Choice, Curve, Ways, least_cost, least_memory, spend
from rana_kernels.allocation.split import RANK_STEP, Splits, smallest_budget
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.format import Format
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.thresholds import evenly

SHARES = tuple(i / 48 for i in range(1, 48))  # cost ratios at which a curve has its choices
ERROR_TOKENS = 1024  # of the sample, to measure the errors of neuron adapters
# The errors of joint neurons count this many times. A sample of ERROR_TOKENS does not settle a difference of
# 1 %, and one call is faster than several.
JOINT = 1 / 1.01


class WholeModel(Method):
    name = "global"
    summary = "one budget for the whole model"
    needs = {"inputs": ("qkv", "o", "mlp", "down"), "gradients": True}
    any_budget = True

    def prepare(
        self, stats: Stats, request: Request, store: ResumeDir | None = None, progress: bool = True
    ) -> Chooser:
        return chooser_of(plan_curves(stats, model_curves(stats, request.cost_model, progress), request))


def model_curves(stats: Stats, cost_model: CostModel = MULTIPLY_ADDS, progress: bool = True) -> list[Ways]:
    """Return the curves of all blocks, for any budget in the unit of `cost_model`.

    The factors of one block are in memory at a time.
    """
    curves: list[Ways] = []
    for block in track(stats.blocks, "planning", disable=not progress, transient=True):
        curves += block_curves(CalibratedBlock(stats.model, block, stats), cost_model)
    return curves


def plan_curves(stats: Stats, curves: list[Ways], request: Request) -> Plan:
    """Return the plan of least total error. `curves` are those of all blocks, in the unit of the request."""
    # the first way adapts each linear alone, and the first choice of a curve is the dense linear
    dense = sum(curve[0].cost for ways in curves for curve in ways[0])
    budget = (1 - request.reduction) * dense
    if request.max_memory is not None and request.format.quantized:
        curves = [_stored_as(request.format, ways, stats.model) for ways in curves]
    chosen = spend(curves, budget, request.max_memory)
    if chosen is None:
        raise ValueError(_out_of_reach(curves, request, budget, dense))
    by_name = {name: choice.adapter for choice in chosen for name in choice.adapter.names}
    ordered = dict.fromkeys(by_name[name] for block in stats.blocks for name in block.linears)
    return request.record(tuple(ordered))


def _stored_as(format: Format, ways: Ways, model: nn.Module) -> Ways:
    """Return the same choices with the bytes that they store in another format."""

    def stored(choice: Choice) -> Choice:
        itemsize = linear_of(model, choice.adapter.names[0]).weight.element_size()
        return replace(choice, bytes=choice.adapter.with_format(format).stored_bytes(itemsize))

    return [[[stored(choice) for choice in curve] for curve in way] for way in ways]


def _out_of_reach(curves: list[Ways], request: Request, budget: float, dense: float) -> str:
    stored = least_memory(curves, budget)
    if stored is not None:
        return (
            f"max_memory is {request.max_memory}, wanted at least {stored} bytes with {request.unit} "
            f"{request.reduction}: what the linears of the blocks then store"
        )
    most = int(1000 * (1 - least_cost(curves) / dense)) / 1000
    return f"{request.unit} is {request.reduction}, wanted more than 0 and at most {most}"


def block_curves(calibrated: CalibratedBlock, cost_model: CostModel = MULTIPLY_ADDS) -> list[Ways]:
    """Return the ways to adapt each input's linears: each linear alone, or all of them jointly."""
    curves: list[Ways] = []
    for names in calibrated.block.inputs.values():
        apart = [_single(calibrated, name, cost_model) for name in names]
        joint = [[*_ranks(calibrated, names, cost_model), *_neurons(calibrated, names, cost_model)]]
        curves.append([apart, joint] if len(names) > 1 else [apart])
    return curves


def _single(calibrated: CalibratedBlock, name: str, cost_model: CostModel) -> Curve:
    """Return the choices for one linear: dense first, then its rank and neuron adapters."""
    dense = _choice(calibrated, cost_model, dense_spec(calibrated, name), 0.0)
    return [dense, *_ranks(calibrated, (name,), cost_model), *_neurons(calibrated, (name,), cost_model)]


def _choice(calibrated: CalibratedBlock, cost_model: CostModel, adapter: AdapterSpec, error: float) -> Choice:
    itemsize = calibrated.linear(adapter.names[0]).weight.element_size()
    return Choice(cost(cost_model, adapter), adapter.stored_bytes(itemsize), error, adapter)


def _ranks(calibrated: CalibratedBlock, names: tuple[str, ...], cost_model: CostModel) -> Iterator[Choice]:
    """Yield rank adapters of each cost that pays for one: some that store little, then the best."""
    N, K = calibrated.weight(names).shape
    line = cost_model.rank(K, N)
    splits = Splits(calibrated.rank_scores(names, "loss"), line)
    for share in SHARES:
        budget = share * sum(cost_model.dense(K, calibrated.linear(name).out_features) for name in names)
        if budget < smallest_budget(line) or min(K, N) < RANK_STEP:
            continue
        for split in splits.frontier(budget):
            adapter = make_spec(calibrated, "rank", names, split.rank, split.live, None, "loss")
            yield _choice(calibrated, cost_model, adapter, split.dropped)


def _neurons(calibrated: CalibratedBlock, names: tuple[str, ...], cost_model: CostModel) -> Iterator[Choice]:
    """Yield neuron adapters of each cost. Their errors are measured on some tokens."""
    x, norms = calibrated.sample(calibrated.input_of(names)), calibrated.joint_norms(names, "loss")
    x = x[evenly(len(x), ERROR_TOKENS)]
    weight, counted = _narrowed(calibrated.weighted(names, "loss")), JOINT if len(names) > 1 else 1.0
    scores = x.abs() * norms
    ordered = scores.flatten().sort(descending=True).values
    for share in SHARES:
        threshold = ordered[min(round(share * len(ordered)), len(ordered) - 1)]
        error = torch.where(scores < threshold, x, 0) @ weight.T
        adapter = make_spec(calibrated, "neuron", names, x.shape[1], share * x.shape[1], None, "loss")
        mean_error = float(error.square().sum(dtype=torch.float64)) / len(x)
        yield _choice(calibrated, cost_model, adapter, counted * mean_error)


def _narrowed(weight: Tensor) -> Tensor:
    """Return [min(N, K), K]: its outputs have the same norms as those of `weight` [N, K]."""
    return torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight
