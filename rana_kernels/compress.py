"""Compression: calibrate → plan → modules, in place, one block at a time.

The paper's method decomposes each linear once; one budget for the whole model has to see all of them
before it can decide, so there what was chosen is decomposed again for its modules: a thirtieth of the
time, where to keep all factors would take the memory of two more models. A block's factors are dropped when
its modules are in place, so that there are never two copies of the model. Only linears are replaced:
embeddings and norms stay, and so do the weights of lm_head and of linears left dense.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

from rich.progress import track
from torch import Tensor, nn

from rana_kernels import allocate
from rana_kernels.calibrate import Stats, calibrate
from rana_kernels.card import made_from
from rana_kernels.checkpoint import attach_plan
from rana_kernels.dense import serve_dense
from rana_kernels.fill import block_tensors, with_threshold
from rana_kernels.huge_pages import use_huge_pages
from rana_kernels.install import check_plan, dense_names, put
from rana_kernels.layer import Layer
from rana_kernels.measure import (
    AdapterReport,
    CompressReport,
    block_bytes,
    measure,
    model_bytes,
    model_flops_reduction,
)
from rana_kernels.methods import paper
from rana_kernels.methods.prices import reduction
from rana_kernels.methods.request import WHOLE, Request
from rana_kernels.methods.search import Search
from rana_kernels.models import describe, find_blocks
from rana_kernels.plan import Adapter, Plan
from rana_kernels.resume import ResumeDir, fingerprint
from rana_kernels.times import Times


def compress(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    flops_reduction: float | None = None,
    time_reduction: float | None = None,
    times: Times | None = None,
    max_memory: int | None = None,
    method: str = allocate.DEFAULT,
    search: Search | None = None,
    plan: Plan | None = None,
    stats: Stats | None = None,
    patterns: Mapping[str, Any] | None = None,
    resume_dir: str | PathLike | None = None,
    progress: bool = True,
) -> CompressReport:
    """Replace the linears of `model`'s blocks by adapters, in place.

    calibration       as in `calibrate`; not needed where `stats` are given
    flops_reduction   share of the block linears' FLOPs to save, by `method`; or else a `plan`, whose
                      missing thresholds are chosen from the token sample
    time_reduction    in place of FLOPs: share of the time that these linears take for one token, by `times`
                      (`rana_kernels.times.Times`)
    max_memory        bytes that these linears may store (weights, biases, thresholds, scales)
    search            for `method="rankadaptor"`: rows to measure on that the calibration does not have
    patterns          for a model of an architecture that is not known: which of its linears is what, by
                      the fields of `rana_kernels.models.Architecture`. Its forward takes token ids first
    resume_dir        what is finished is kept here; the same call after an interruption goes on from it
                      (load the original model again first)

    Raises ValueError for arguments that do not fit together or the model, before it is touched.
    """
    started = time.monotonic()
    if patterns is not None:
        describe(model, patterns)
    request = _request(
        model, plan, search, method=method, flops_reduction=flops_reduction,
        time_reduction=time_reduction, times=times, max_memory=max_memory,
    )  # fmt: skip
    stats = _stats(model, calibration, stats, method, plan, progress)
    blocks = find_blocks(model)
    asked_for = plan.to_json() if plan else repr(request)
    facts = (stats.digest, asked_for, *([search.digest] if search else []))
    made = {"model, calibration or request": fingerprint(model, blocks, *facts)}
    store = ResumeDir(resume_dir, made) if resume_dir else None
    asked, choose = _chooser(stats, request, search, store, plan, progress)
    adapters: list[Adapter] = []
    measured: list[AdapterReport] = []
    bytes_before, block_bytes_before = model_bytes(model), block_bytes(model)
    for block in track(blocks, "compressing", disable=not progress, transient=True):
        tensors, found, reports = _block(Layer(model, block, stats), choose, store)
        put(model, block, found, tensors)
        adapters += found
        measured += reports
    done = asked.with_adapters(tuple(adapters))
    serve_dense(model, dense_names(model, done))
    use_huge_pages(model)
    report = CompressReport(
        plan=done,
        adapters=measured,
        block_flops_reduction=done.reduction,
        model_flops_reduction=model_flops_reduction(model, done),
        bytes_before=bytes_before,
        bytes_after=model_bytes(model),
        block_bytes_before=block_bytes_before,
        block_bytes_after=block_bytes(model),
        block_time_reduction=reduction(times, done) if times else None,
        seconds=time.monotonic() - started,
    )
    if hasattr(model, "config"):  # so that model.save_pretrained writes what can be loaded
        attach_plan(model, done, made_from(model, stats, report))
    return report


Chooser = Callable[[Layer], list[Adapter]]


def _request(
    model: nn.Module, plan: Plan | None, search: Search | None, *, method: str, **asked: Any
) -> Request | None:
    """What is asked for; None where there is a plan. Raises before the calibration runs, not after."""
    if plan is not None:
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise ValueError(f"compress: a plan is given, and {', '.join(given)}: wanted exactly one of them")
        check_plan(model, plan)
        return None
    allocate.check_method(method, search)
    request = Request(method, **asked)
    if request.times:
        request.times.require(model)
    if method not in WHOLE:
        paper.keep_for(model, find_blocks(model), request.reduction, method)
    return request


def _chooser(
    stats: Stats,
    request: Request | None,
    search: Search | None,
    store: ResumeDir | None,
    plan: Plan | None,
    progress: bool,
) -> tuple[Plan, Chooser]:
    """The plan, or its start, and what decides the adapters of a block: it, or the method at its budget."""
    model = stats.model
    if request is not None and request.method not in WHOLE:
        # layer by layer, while its factors are there: each linear is decomposed once
        method = request.method
        keep = paper.keep_for(model, find_blocks(model), request.reduction, method)
        return request.record(), lambda layer: paper.plan_layer(layer, keep, method)
    if plan is None:
        assert request is not None, "there is a plan or a request"
        plan = allocate.plan_request(stats, request, search, store, progress)
    planned = {block.index: adapters for block, adapters in check_plan(model, plan)}
    return plan, lambda layer: planned[layer.block.index]


def _stats(
    model: nn.Module,
    calibration: Iterable | None,
    stats: Stats | None,
    method: str,
    plan: Plan | None,
    progress: bool,
) -> Stats:
    if (calibration is None) == (stats is None):
        raise ValueError("compress: wanted exactly one of calibration and stats")
    needs = allocate.NEEDS[method] if plan is None else _needs_of(model, plan)
    if stats is None:
        assert calibration is not None
        return calibrate(model, calibration, **needs, progress=progress)
    if stats.model is not model:
        raise ValueError("compress: the statistics are of another model object than the one given")
    stats.require(needs["inputs"])
    return stats


def _needs_of(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """What of `calibrate` a plan needs; what down reads is computed from what the MLP reads."""
    needed = {"mlp"}
    for block, adapters in check_plan(model, plan):
        for adapter in adapters:
            name = next(key for key, readers in block.inputs.items() if adapter.names[0] in readers)
            if adapter.kind == "rank" or (adapter.kind == "neuron" and name != "down"):
                needed.add(name)
    return {"inputs": tuple(sorted(needed)), "gradients": any(a.metric == "loss" for a in plan.adapters)}


def _block(
    layer: Layer, choose: Chooser, store: ResumeDir | None
) -> tuple[dict[str, Tensor], list[Adapter], list[AdapterReport]]:
    """Tensors, adapters and measurements of one block, from the store if it was finished before."""
    index = layer.block.index
    finished = store.load(index) if store else None
    if finished is not None:
        tensors, record = finished
        adapters = list(Plan.from_json(record["plan"]).adapters)
        reports = [AdapterReport(**{**entry, "names": tuple(entry["names"])}) for entry in record["reports"]]
        return tensors, adapters, reports
    adapters = [with_threshold(layer, adapter) for adapter in choose(layer)]
    tensors = block_tensors(layer, adapters)
    reports = [measure(layer, adapter) for adapter in adapters if adapter.kind != "dense"]
    if store:
        record = {"plan": Plan(tuple(adapters)).to_json(), "reports": [asdict(report) for report in reports]}
        store.save(index, tensors, record)
    return tensors, adapters, reports
