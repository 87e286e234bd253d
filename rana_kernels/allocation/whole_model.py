"""One budget for a whole model: where a multiply-add, or a microsecond, saves the most loss.

Every way to adapt a linear, at every cost, has an error: what its output is off by, each output
weighed by how the loss depends on it, so that errors of all linears are in one currency. Which kind of
adapter a linear gets, whether q, k and v or up and gate share their ranks, and what stays dense is not
decided by a rule: `spend.py` finds what loses least together.

Errors of rank adapters are dropped energies, which is what they are. A neuron adapter's are measured,
because the neurons it drops add up: their scores leave the cross terms out and flatter it.
"""

from collections.abc import Iterator

import torch
from rich.progress import track
from torch import Tensor

from rana_kernels.allocation.cost import MULTIPLY_ADDS, CostModel, cost
from rana_kernels.allocation.method import Chooser, Method, chooser_of
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.specs import dense_spec, make_spec
from rana_kernels.allocation.spending import Choice, Curve, Ways, least_cost, least_memory, spend
from rana_kernels.allocation.split import RANK_STEP, Splits, smallest_budget
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.thresholds import evenly

SHARES = tuple(i / 48 for i in range(1, 48))  # of the dense cost: where the curves are taken
ERROR_TOKENS = 1024  # of the sample, for errors that are measured


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
    """The curves of every block, which serve any budget in the unit of `cost_model`. Holds the factors of one
    block at a time."""
    curves: list[Ways] = []
    for block in track(stats.blocks, "planning", disable=not progress, transient=True):
        curves += block_curves(CalibratedBlock(stats.model, block, stats), cost_model)
    return curves


def plan_curves(stats: Stats, curves: list[Ways], request: Request) -> Plan:
    """`curves` of all blocks, in the unit of the request."""
    # the first way is each linear on its own, and its first choice dense
    dense = sum(curve[0].cost for ways in curves for curve in ways[0])
    budget = (1 - request.reduction) * dense
    chosen = spend(curves, budget, request.max_memory)
    if chosen is None:
        raise ValueError(_out_of_reach(curves, request, budget, dense))
    by_name = {name: choice.adapter for choice in chosen for name in choice.adapter.names}
    ordered = dict.fromkeys(by_name[name] for block in stats.blocks for name in block.linears)
    return request.record(tuple(ordered))


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
    """The curves of one block: of q, k and v apart or together, o, up and gate apart or together, down."""
    curves: list[Ways] = []
    for names in calibrated.block.inputs.values():
        apart = [_single(calibrated, name, cost_model) for name in names]
        joint = list(_ranks(calibrated, names, cost_model)) if len(names) > 1 else []
        curves.append([apart, [joint]] if joint else [apart])
    return curves


def _single(calibrated: CalibratedBlock, name: str, cost_model: CostModel) -> Curve:
    """What one linear can become: dense, its first choice, or adapted alone."""
    dense = _choice(calibrated, cost_model, dense_spec(calibrated, name), 0.0)
    return [dense, *_ranks(calibrated, (name,), cost_model), *_neurons(calibrated, name, cost_model)]


def _choice(calibrated: CalibratedBlock, cost_model: CostModel, adapter: AdapterSpec, error: float) -> Choice:
    itemsize = calibrated.linear(adapter.names[0]).weight.element_size()
    return Choice(cost(cost_model, adapter), adapter.stored_bytes(itemsize), error, adapter)


def _ranks(calibrated: CalibratedBlock, names: tuple[str, ...], cost_model: CostModel) -> Iterator[Choice]:
    """Rank adapters at each cost at which there is one: the best, and some that store less."""
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


def _neurons(calibrated: CalibratedBlock, name: str, cost_model: CostModel) -> Iterator[Choice]:
    """Neuron adapters, their errors measured on some tokens."""
    x, norms = calibrated.sample(calibrated.input_of((name,))), calibrated.neuron_norms(name, "loss")
    x = x[evenly(len(x), ERROR_TOKENS)]
    weight = _narrowed(calibrated.weighted((name,), "loss"))
    scores = x.abs() * norms
    ordered = scores.flatten().sort(descending=True).values
    for share in SHARES:
        threshold = ordered[min(round(share * len(ordered)), len(ordered) - 1)]
        error = torch.where(scores < threshold, x, 0) @ weight.T
        adapter = make_spec(calibrated, "neuron", (name,), x.shape[1], share * x.shape[1], None, "loss")
        mean = float(error.square().sum(dtype=torch.float64)) / len(x)
        yield _choice(calibrated, cost_model, adapter, mean)


def _narrowed(weight: Tensor) -> Tensor:
    """[min(N, K), K]: makes outputs of the same length as `weight` [N, K]."""
    return torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight
