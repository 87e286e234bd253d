"""Allocation: from a budget to a Plan, by one of four methods.

global        one budget for the whole model, spent where it saves the most loss (`budget.py`)
rankadaptor   the same, corrected by measurements of what comes of it (`rankadaptor.py`)
paper         RaNA as published, arXiv 2503.18216: the same share for every layer (`paper.py`)
static        plain data-aware low rank, the baseline (`paper.py`)
"""

from typing import Any

from rich.progress import track

from rana_kernels.calibrate import Stats
from rana_kernels.layer import Layer
from rana_kernels.methods import budget, paper, rankadaptor
from rana_kernels.methods.request import Request
from rana_kernels.methods.search import Search
from rana_kernels.models import find_blocks
from rana_kernels.plan import Adapter, Plan
from rana_kernels.resume import ResumeDir
from rana_kernels.times import Times

DEFAULT = "global"
# what of `calibrate` a method reads: its arguments
NEEDS: dict[str, dict[str, Any]] = {
    "global": {"inputs": ("qkv", "o", "mlp", "down"), "gradients": True},
    "rankadaptor": {"inputs": ("qkv", "o", "mlp", "down"), "gradients": True},
    "paper": {"inputs": ("qkv", "mlp"), "gradients": False},
    "static": {"inputs": ("qkv", "mlp", "down"), "gradients": False},
}


def plan(
    stats: Stats,
    *,
    flops_reduction: float | None = None,
    time_reduction: float | None = None,
    times: Times | None = None,
    max_memory: int | None = None,
    method: str = DEFAULT,
    search: Search | None = None,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Plan:
    """Decide what each linear becomes, so that the linears of the blocks lose `flops_reduction`
    (a fraction of their FLOPs; linears that stay dense count).

    time_reduction   in its place: a fraction of the time that they take for one token, by `times`
    max_memory       bytes that they may store, which a FLOPs budget alone does not limit: weights, biases,
                     thresholds and scales
    search   for `rankadaptor`, and wanted there: what to measure with; it says afterwards what was found
    store    keeps what the search measured, for the same call after an interruption

    Works block by block and holds the factors of one block at a time (`rankadaptor`: of all). Raises
    ValueError for an unknown method, statistics that lack what it needs, or a reduction out of reach
    (it says what is).
    """
    check_method(method, search)
    request = Request(method, flops_reduction, time_reduction, times, max_memory)
    return plan_request(stats, request, search, store, progress)


def plan_request(
    stats: Stats, request: Request, search: Search | None, store: ResumeDir | None, progress: bool
) -> Plan:
    """`plan`, for what was checked."""
    stats.require(NEEDS[request.method]["inputs"])
    if request.method == "global":
        return budget.plan_model(stats, request, progress)
    if search is not None:
        return rankadaptor.plan_by_search(stats, request, search, store, progress)
    blocks = find_blocks(stats.model)
    keep = paper.keep_for(stats.model, blocks, request.reduction, request.method)
    adapters: list[Adapter] = []
    for block in track(blocks, "planning", disable=not progress, transient=True):
        adapters += paper.plan_layer(Layer(stats.model, block, stats), keep, request.method)
    return request.record(tuple(adapters))


def check_method(method: str, search: Search | None) -> None:
    if method not in NEEDS:
        raise ValueError(f"method is {method!r}, wanted one of {', '.join(NEEDS)}")
    if (method == "rankadaptor") != (search is not None):
        raise ValueError(
            f"method is {method!r} and search is {'given' if search else None}, wanted a "
            "rana_kernels.methods.search.Search with method 'rankadaptor', and only there"
        )
