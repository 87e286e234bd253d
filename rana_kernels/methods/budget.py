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

from rana_kernels.calibrate import Stats
from rana_kernels.layer import Layer
from rana_kernels.methods.adapters import dense_adapter, make_adapter
from rana_kernels.methods.prices import MULTIPLY_ADDS, Prices, cost
from rana_kernels.methods.request import Request
from rana_kernels.methods.spend import Choice, Curve, Ways, least_cost, least_memory, spend
from rana_kernels.methods.split import RANK_STEP, Splits, smallest_budget
from rana_kernels.models import find_blocks
from rana_kernels.plan import Adapter, Plan

SHARES = tuple(i / 48 for i in range(1, 48))  # of the dense cost: where the curves are taken
ERROR_TOKENS = 1024  # of the sample, for errors that are measured


def plan_model(stats: Stats, request: Request, progress: bool = True) -> Plan:
    """The plan of least loss; `compress` fills its thresholds in. ValueError for a request out of reach."""
    return plan_curves(stats, model_curves(stats, request.prices, progress), request)


def model_curves(stats: Stats, prices: Prices = MULTIPLY_ADDS, progress: bool = True) -> list[Ways]:
    """The curves of every block, which serve any budget in the unit of `prices`. Holds the factors of one
    block at a time."""
    curves: list[Ways] = []
    for block in track(find_blocks(stats.model), "planning", disable=not progress, transient=True):
        curves += block_curves(Layer(stats.model, block, stats), prices)
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
    ordered = dict.fromkeys(by_name[name] for block in find_blocks(stats.model) for name in block.linears)
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


def block_curves(layer: Layer, prices: Prices = MULTIPLY_ADDS) -> list[Ways]:
    """The curves of one block: of q, k and v apart or together, o, up and gate apart or together, down."""
    curves: list[Ways] = []
    for names in layer.block.inputs.values():
        apart = [_single(layer, name, prices) for name in names]
        joint = list(_ranks(layer, names, prices)) if len(names) > 1 else []
        curves.append([apart, [joint]] if joint else [apart])
    return curves


def _single(layer: Layer, name: str, prices: Prices) -> Curve:
    """What one linear can become: dense, its first choice, or adapted alone."""
    dense = _choice(layer, prices, dense_adapter(layer, name), 0.0)
    return [dense, *_ranks(layer, (name,), prices), *_neurons(layer, name, prices)]


def _choice(layer: Layer, prices: Prices, adapter: Adapter, error: float) -> Choice:
    itemsize = layer.linear(adapter.names[0]).weight.element_size()
    return Choice(cost(prices, adapter), adapter.stored_bytes(itemsize), error, adapter)


def _ranks(layer: Layer, names: tuple[str, ...], prices: Prices) -> Iterator[Choice]:
    """Rank adapters at each cost at which there is one: the best, and some that store less."""
    N, K = layer.weight(names).shape
    line = prices.rank(K, N)
    splits = Splits(layer.rank_scores(names, "loss"), line)
    for share in SHARES:
        budget = share * sum(prices.dense(K, layer.linear(name).out_features) for name in names)
        if budget < smallest_budget(line) or min(K, N) < RANK_STEP:
            continue
        for split in splits.frontier(budget):
            adapter = make_adapter(layer, "rank", names, split.rank, split.live, None, "loss")
            yield _choice(layer, prices, adapter, split.dropped)


def _neurons(layer: Layer, name: str, prices: Prices) -> Iterator[Choice]:
    """Neuron adapters, their errors measured on some tokens."""
    x, scale = layer.sample(layer.input_of((name,))), layer.scale(name, "loss")
    x = x[:: -(-len(x) // ERROR_TOKENS)]
    weight = _narrowed(layer.weighted((name,), "loss"))
    scores = x.abs() * scale
    ordered = scores.flatten().sort(descending=True).values
    for share in SHARES:
        threshold = ordered[min(round(share * len(ordered)), len(ordered) - 1)]
        error = torch.where(scores < threshold, x, 0) @ weight.T
        adapter = make_adapter(layer, "neuron", (name,), x.shape[1], share * x.shape[1], None, "loss")
        mean = float(error.square().sum(dtype=torch.float64)) / len(x)
        yield _choice(layer, prices, adapter, mean)


def _narrowed(weight: Tensor) -> Tensor:
    """[min(N, K), K]: makes outputs of the same length as `weight` [N, K]."""
    return torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight
