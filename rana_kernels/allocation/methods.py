"""The methods of allocation in one table, and the way from statistics and a budget to a Plan."""

from typing import Any

from rich.progress import track

from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.method import Method
from rana_kernels.allocation.paper import Paper, Static
from rana_kernels.allocation.rankadaptor import RankAdaptor
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.search import Search
from rana_kernels.allocation.whole_model import WholeModel
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats

METHODS: dict[str, Method] = {
    method.name: method for method in (WholeModel(), RankAdaptor(), Paper(), Static())
}
DEFAULT = "global"


def plan(
    stats: Stats,
    *,
    flops_reduction: float | None = None,
    time_reduction: float | None = None,
    times: LatencyTable | None = None,
    max_memory: int | None = None,
    method: str = DEFAULT,
    search: Search | None = None,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Plan:
    """Decide what each linear becomes, so that the linears of the blocks lose `flops_reduction`
    (a fraction of their FLOPs; linears that stay dense count).

    time_reduction   instead of FLOPs: the fraction to save of the time that these linears take for one token
    times            the measured times that `time_reduction` is counted by
    max_memory       bytes that these linears may store (weights, biases, thresholds and norms). A budget of
                     FLOPs alone does not limit them
    method           a name in `METHODS`
    search           what `rankadaptor` measures with, and wants. Afterwards it says what was found
    store            keeps what the search measured, for the same call after an interruption

    Works block by block and holds the factors of one block at a time (`rankadaptor`: of all). Raises
    ValueError for an unknown method, statistics that lack what it needs, or a reduction out of reach
    (it says what is in reach).
    """
    request = make_request(
        method, flops_reduction=flops_reduction, time_reduction=time_reduction, latency=times,
        max_memory=max_memory, search=search,
    )  # fmt: skip
    chosen = METHODS[method]
    stats.require(chosen.needs["inputs"])
    choose = chosen.prepare(stats, request, store, progress)
    adapters: list[AdapterSpec] = []
    for block in track(stats.blocks, "planning", disable=not progress, transient=True):
        adapters += choose(CalibratedBlock(stats.model, block, stats))
    return request.record(tuple(adapters))


def make_request(method: str, *, search: Search | None = None, **asked: Any) -> Request:
    """Return the request for one of the `METHODS`. Raise ValueError if method and budget do not fit together."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, wanted one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    if chosen.searches != (search is not None):
        wanted = next(name for name, other in METHODS.items() if other.searches)
        raise ValueError(
            f"method is {method!r} and search is {'given' if search else None}, wanted a "
            f"rana_kernels.allocation.search.Search with method {wanted!r}, and only there"
        )
    request = Request(method, search=search, **asked)
    if not chosen.any_budget and (request.latency or request.max_memory):
        able = " or ".join(repr(name) for name, other in METHODS.items() if other.any_budget)
        raise ValueError(
            f"method {method!r} counts FLOPs and stores what they pay for: time_reduction and "
            f"max_memory want method {able}"
        )
    return request
