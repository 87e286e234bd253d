"""Allocation: from a FLOPs budget to a Plan, by one of four methods.

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
from rana_kernels.methods.search import Search
from rana_kernels.models import find_blocks
from rana_kernels.plan import Adapter, Plan
from rana_kernels.resume import ResumeDir

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
    flops_reduction: float,
    method: str = DEFAULT,
    search: Search | None = None,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Plan:
    """Decide what each linear becomes, so that the linears of the blocks lose `flops_reduction`
    (a fraction of their FLOPs; linears that stay dense count).

    search   for `rankadaptor`, and wanted there: what to measure with; it says afterwards what was found
    store    keeps what the search measured, for the same call after an interruption

    Works block by block and holds the factors of one block at a time (`rankadaptor`: of all). Raises
    ValueError for an unknown method, statistics that lack what it needs, or a reduction out of reach
    (it says what is).
    """
    check_method(method, search)
    stats.require(NEEDS[method]["inputs"])
    if method == "global":
        return budget.plan_model(stats, flops_reduction, progress)
    if search is not None:
        return rankadaptor.plan_by_search(stats, flops_reduction, search, store, progress)
    blocks = find_blocks(stats.model)
    keep = paper.keep_for(stats.model, blocks, flops_reduction, method)
    adapters: list[Adapter] = []
    for block in track(blocks, "planning", disable=not progress, transient=True):
        adapters += paper.plan_layer(Layer(stats.model, block, stats), keep, method)
    return Plan(tuple(adapters), method, flops_reduction)


def check_method(method: str, search: Search | None) -> None:
    if method not in NEEDS:
        raise ValueError(f"method is {method!r}, wanted one of {', '.join(NEEDS)}")
    if (method == "rankadaptor") != (search is not None):
        raise ValueError(
            f"method is {method!r} and search is {'given' if search else None}, wanted a "
            "rana_kernels.methods.search.Search with method 'rankadaptor', and only there"
        )
