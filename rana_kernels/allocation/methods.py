"""The table of all methods of allocation, and `plan`, which makes a Plan from statistics and a budget."""

from typing import Any

from torch import nn

from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.method import Chooser, Method
from rana_kernels.allocation.paper import Paper, Static
from rana_kernels.allocation.rankadaptor import RankAdaptor
from rana_kernels.allocation.request import Request, formats
from rana_kernels.allocation.search import Search
from rana_kernels.allocation.specs import dense_spec
from rana_kernels.allocation.whole_model import WholeModel
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.head import output_head
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.quantization.moments import INPUTS
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.system.progress import track

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
    bytes_reduction: float | None = None,
    bits: int | str = 16,
    group: int | None = 32,
    lm_head_bits: int | str | None = None,
    method: str = DEFAULT,
    search: Search | None = None,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Plan:
    """Decide the adapter of every linear of the blocks, for a budget. Give exactly one reduction.

    flops_reduction  the fraction to save of the FLOPs of these linears; the ones that stay dense count too
    time_reduction   the fraction to save of the time that these linears take for one token
    times            the measured times that `time_reduction` refers to
    max_memory       the bytes that these linears may store (weights, biases, thresholds and norms). A budget
                     of FLOPs alone does not limit them
    bytes_reduction  the fraction to save of the bytes that a token reads in these linears and lm_head,
                     against floats. lm_head may get a mask, too. Only `global`
    bits             of the weights: 16 (floats of the model's dtype), 8, 4, or "auto" in a budget of bytes:
                     every linear gets the bits that lose least
    group            columns that share a scale in 8 and 4 bits: 32, 64, 128, or None for a whole row
    lm_head_bits     of the weight of lm_head. None: like `bits`
    method           a name in `METHODS`
    search           the settings of the search, for `rankadaptor` only. The measured losses are stored in it
    store            keeps the measurements of the search, so that the same call goes on after an interruption

    The factors of one block are in memory at a time (`rankadaptor`: those of all blocks). Raises ValueError
    for an unknown method, if statistics are missing, or for a reduction out of reach (the message says
    what is in reach).
    """
    own, head_formats = formats(stats.model, bits, group, lm_head_bits)
    request = make_request(
        method, flops_reduction=flops_reduction, time_reduction=time_reduction, times=times,
        max_memory=max_memory, bytes_reduction=bytes_reduction, search=search, formats=own,
        lm_head_formats=head_formats,
    )  # fmt: skip
    METHODS[method].check(stats.model, stats.blocks, request)
    stats.require(needs(request, stats.model)["inputs"])
    choose = prepare(stats, request, store, progress)
    adapters: list[AdapterSpec] = []
    for block in track(stats.blocks, "planning", progress):
        adapters += choose(CalibratedBlock(stats.model, block, stats))
    head = None
    if request.changes_head and stats.head is not None:
        (head,) = choose(CalibratedBlock(stats.model, stats.head, stats))
    return request.record(tuple(adapters), head if head is not None and head.changes else None)


def needs(request: Request, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `calibrate` that collect the statistics for a request."""
    own = METHODS[request.method].needs
    more = [*(INPUTS if request.quantized else ()), *(["lm_head"] if request.changes_head else [])]
    # rounding weighs tokens by the derivatives of the loss, where there is one
    gradients = own["gradients"] or (request.quantized and output_head(model) is not None)
    return {**own, "inputs": tuple(sorted({*own["inputs"], *more})), "gradients": gradients}


def prepare(stats: Stats, request: Request, store: ResumeDir | None, progress: bool) -> Chooser:
    """Do what `Method.prepare` does, for lm_head too. Formats of which there is no choice are set here."""
    choose = METHODS[request.method].prepare(stats, request, store, progress)

    def choose_formats(calibrated: CalibratedBlock) -> list[AdapterSpec]:
        head = calibrated.block.head
        if head and not request.in_bytes:
            return [dense_spec(calibrated, head).with_format(request.lm_head_formats[0])]
        asked = request.lm_head_formats if head else request.formats
        own = choose(calibrated)
        return own if len(asked) > 1 else [adapter.with_format(asked[0]) for adapter in own]

    return choose_formats


def make_request(method: str, *, search: Search | None = None, **asked: Any) -> Request:
    """Return the request for a method of `METHODS`. Raise ValueError if it cannot serve the budget."""
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
    if request.in_bytes and not chosen.in_bytes:
        able = " or ".join(repr(name) for name, other in METHODS.items() if other.in_bytes)
        raise ValueError(f"method {method!r} does not count bytes: bytes_reduction wants method {able}")
    if not chosen.any_budget and (request.times or request.max_memory):
        able = " or ".join(repr(name) for name, other in METHODS.items() if other.any_budget)
        raise ValueError(
            f"method {method!r} counts FLOPs and stores what they pay for: time_reduction and "
            f"max_memory want method {able}"
        )
    return request
