"""`method="global"`: one budget for the whole model, spent where it saves the most loss.

Every choice has an estimated loss (`curves.py`), so the choices of different linears can be compared and
added. No rule decides which kind of adapter a linear gets, in how many bits, whether linears share their
ranks, or which linears stay dense: `spending.py` finds the choices of least total loss. In a budget of bytes,
lm_head is one of the linears.

Several linears that read one input may share the mask of a joint neuron adapter. It costs the same FLOPs as
separate ones, but it is one call. Therefore it is preferred if its error is at most 1 % larger.
"""

from dataclasses import replace

from rana_kernels.allocation.curves import block_curves
from rana_kernels.allocation.dial import with_dial
from rana_kernels.allocation.method import Chooser, Method, chooser_of
from rana_kernels.allocation.pricing import Pricing
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.spending import Ways, least_cost, least_memory, spend
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import Plan
from rana_kernels.nn.format import FLOAT
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.system.progress import track


class WholeModel(Method):
    name = "global"
    summary = "one budget for the whole model"
    needs = {"inputs": ("qkv", "o", "mlp", "down"), "gradients": True}
    any_budget = True
    in_bytes = True

    def prepare(
        self, stats: Stats, request: Request, store: ResumeDir | None = None, progress: bool = True
    ) -> Chooser:
        curves = model_curves(stats, request.pricing, progress)
        of_head = head_curves(stats, stats.head, request) if request.in_bytes and stats.head else []
        made = plan_curves(stats, [*curves, *of_head], request)
        # in any other budget, norms and thresholds of linears without masks have a price
        in_flops = request.flops_reduction is not None and request.max_memory is None
        return chooser_of(with_dial(made, curves, masks_dense=in_flops))


def model_curves(stats: Stats, pricing: Pricing | None = None, progress: bool = True) -> list[Ways]:
    """Return the curves of all blocks, for any budget in the unit of `pricing`.

    The factors of one block are in memory at a time.
    """
    curves: list[Ways] = []
    for block in track(stats.blocks, "planning", progress):
        curves += block_curves(CalibratedBlock(stats.model, block, stats), pricing)
    return curves


def head_curves(stats: Stats, head: Block, request: Request) -> list[Ways]:
    """Return the curves of lm_head in bytes. Its own bytes are 0, because `max_memory` leaves it out."""
    curves = block_curves(CalibratedBlock(stats.model, head, stats), request.head_pricing)
    return [
        [[[replace(choice, bytes=0) for choice in curve] for curve in way] for way in ways] for ways in curves
    ]


def plan_curves(stats: Stats, curves: list[Ways], request: Request) -> Plan:
    """Return the plan of least total loss.

    curves   those of all blocks in the formats and the unit of the request; in a budget of bytes, then those
             of lm_head
    """
    dense, constant = _dense_cost(stats, request)
    budget = (1 - request.reduction) * (dense + constant) - constant
    chosen = spend(curves, budget, request.max_memory)
    if chosen is None:
        raise ValueError(_out_of_reach(curves, request, budget, dense + constant, constant))
    by_name = {name: choice.adapter for choice in chosen for name in choice.adapter.names}
    ordered = dict.fromkeys(by_name[name] for block in stats.blocks for name in block.linears)
    head = by_name.get(stats.head.head) if stats.head is not None else None
    return request.record(tuple(ordered), head if head is not None and head.changes else None)


def _dense_cost(stats: Stats, request: Request) -> tuple[float, float]:
    """Return the cost of the original linears, and the bytes that every choice reads alike: biases."""
    blocks = [*stats.blocks, *([stats.head] if request.in_bytes and stats.head is not None else [])]
    dense = constant = 0.0
    for name in (name for block in blocks for name in block.linears):
        linear = linear_of(stats.model, name)
        itemsize = linear.weight.element_size()
        costs = request.pricing.in_format(FLOAT, itemsize)
        dense += costs.dense(linear.in_features, linear.out_features)
        if request.in_bytes and linear.bias is not None:
            constant += itemsize * linear.out_features
    return dense, constant


def _out_of_reach(curves: list[Ways], request: Request, budget: float, dense: float, constant: float) -> str:
    stored = least_memory(curves, budget)
    if stored is not None:
        return (
            f"max_memory is {request.max_memory}, wanted at least {stored} bytes with {request.unit} "
            f"{request.reduction}: what the linears of the blocks then store"
        )
    most = int(1000 * (1 - (least_cost(curves) + constant) / dense)) / 1000
    return f"{request.unit} is {request.reduction}, wanted more than 0 and at most {most}"
