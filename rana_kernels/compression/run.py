"""Compression: calibrate, plan, then put modules in place, one block at a time.

A method that plans layer by layer decomposes each linear once. A budget for the whole model needs all linears
before it can decide, so what it chooses is decomposed a second time for its modules. That takes a thirtieth of
the time, and keeping all factors would take the memory of two more models. A block's factors are dropped when
its modules are in place, so there are never two copies of the model. Only linears are replaced: embeddings and
norms stay, and so do the weights of lm_head and of linears that are left dense.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

from rich.progress import track
from torch import Tensor, nn

from rana_kernels.allocation.cost import reduction
from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.method import Chooser, chooser_of
from rana_kernels.allocation.methods import DEFAULT, METHODS, make_request
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.search import Search
from rana_kernels.checkpoint.attachment import attach_plan
from rana_kernels.checkpoint.resume import ResumeDir, fingerprint
from rana_kernels.compression.report import (
    AdapterReport,
    CompressReport,
    block_bytes,
    facts_of,
    measure,
    model_bytes,
    model_flops_reduction,
)
from rana_kernels.model.architectures import Block, describe, find_blocks
from rana_kernels.model.install import check_plan, dense_names, install_block
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.dense import serve_dense
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats, calibrate_blocks
from rana_kernels.statistics.tensors import block_tensors, with_threshold
from rana_kernels.system.huge_pages import use_huge_pages


def compress(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    flops_reduction: float | None = None,
    time_reduction: float | None = None,
    times: LatencyTable | None = None,
    max_memory: int | None = None,
    method: str = DEFAULT,
    search: Search | None = None,
    plan: Plan | None = None,
    stats: Stats | None = None,
    patterns: Mapping[str, Any] | None = None,
    resume_dir: str | PathLike | None = None,
    progress: bool = True,
) -> CompressReport:
    """Replace the linears of `model`'s blocks by adapters, in place.

    calibration       as in `calibrate`; not needed where `stats` are given
    flops_reduction   share of the block linears' FLOPs to save, by `method`. Give this, `time_reduction` or a
                      `plan`, whose missing thresholds are chosen from the token sample
    time_reduction    share of the time to save that these linears take for one token, counted by `times`
                      (`rana_kernels.allocation.latency.LatencyTable`)
    max_memory        bytes that these linears may store (weights, biases, thresholds, norms)
    search            for `method="rankadaptor"`: token ids to measure on that the calibration does not have
    patterns          for a model of an architecture that is not known: which of its linears is what, by
                      the fields of `rana_kernels.model.architectures.Architecture`. Its forward takes token
                      ids first
    resume_dir        keeps what is finished. The same call after an interruption goes on from there (load
                      the original model again first)

    Raises ValueError for arguments that do not fit together or the model, before it is touched.
    """
    started = time.monotonic()
    if patterns is not None:
        describe(model, patterns)
    if (calibration is None) == (stats is None):
        raise ValueError("compress: wanted exactly one of calibration and stats")
    if stats is not None and stats.model is not model:
        raise ValueError("compress: the statistics are of another model object than the one given")
    blocks = stats.blocks if stats is not None else find_blocks(model)
    asked = {
        "flops_reduction": flops_reduction, "time_reduction": time_reduction, "latency": times,
        "max_memory": max_memory,
    }  # fmt: skip
    if plan is None:
        request = make_request(method, search=search, **asked)
        METHODS[method].check(model, blocks, request)
        needs, wanted = METHODS[method].needs, repr(request)
    else:
        _require_alone(asked)
        request, needs, wanted = None, _needs_of(check_plan(model, blocks, plan), plan), plan.to_json()
    if stats is None:
        assert calibration is not None
        stats = calibrate_blocks(model, blocks, calibration, **needs, progress=progress)
    stats.require(needs["inputs"])
    facts = (stats.digest, wanted, *([search.digest] if search else []))
    made = {"model, calibration or request": fingerprint(model, blocks, *facts)}
    store = ResumeDir(resume_dir, made) if resume_dir else None
    choose = _chooser(stats, plan, request, store, progress)
    bytes_before, block_bytes_before = model_bytes(model), block_bytes(model, blocks)
    adapters: list[AdapterSpec] = []
    measured: list[AdapterReport] = []
    for block in track(blocks, "compressing", disable=not progress, transient=True):
        tensors, found, reports = _compress_block(CalibratedBlock(model, block, stats), choose, store)
        install_block(model, block, found, tensors)
        adapters += found
        measured += reports
    start = plan if request is None else request.record()
    assert start is not None, "there is a plan or a request"
    done = start.with_adapters(tuple(adapters))
    serve_dense(model, dense_names(model, done))
    use_huge_pages(model)
    report = CompressReport(
        plan=done,
        adapters=measured,
        block_flops_reduction=done.reduction,
        model_flops_reduction=model_flops_reduction(model, blocks, done),
        bytes_before=bytes_before,
        bytes_after=model_bytes(model),
        block_bytes_before=block_bytes_before,
        block_bytes_after=block_bytes(model, blocks),
        block_time_reduction=reduction(times, done) if times else None,
        seconds=time.monotonic() - started,
    )
    if hasattr(model, "config"):  # so that model.save_pretrained writes what can be loaded
        attach_plan(model, done, facts_of(model, stats, report))
    return report


def _require_alone(asked: dict[str, Any]) -> None:
    """Raise ValueError where something is asked for beside a plan."""
    given = ["times" if name == "latency" else name for name, value in asked.items() if value is not None]
    if given:
        raise ValueError(f"compress: a plan is given, and {', '.join(given)}: wanted exactly one of them")


def _needs_of(planned: list[tuple[Block, list[AdapterSpec]]], plan: Plan) -> dict[str, Any]:
    """Return the arguments of `calibrate` for a plan. What down reads is computed from what the MLP reads."""
    needed = {"mlp"}
    for block, adapters in planned:
        for adapter in adapters:
            name = next(key for key, readers in block.inputs.items() if adapter.names[0] in readers)
            if adapter.kind == "rank" or (adapter.kind == "neuron" and name != "down"):
                needed.add(name)
    return {"inputs": tuple(sorted(needed)), "gradients": any(a.metric == "loss" for a in plan.adapters)}


def _chooser(
    stats: Stats, plan: Plan | None, request: Request | None, store: ResumeDir | None, progress: bool
) -> Chooser:
    """Return what decides the adapters of a block: the plan, or the method at its budget."""
    if request is None:
        assert plan is not None, "there is a plan or a request"
        return chooser_of(plan)
    return METHODS[request.method].prepare(stats, request, store, progress)


def _compress_block(
    calibrated: CalibratedBlock, choose: Chooser, store: ResumeDir | None
) -> tuple[dict[str, Tensor], list[AdapterSpec], list[AdapterReport]]:
    """Return tensors, adapters and measurements of one block, from the store if it was finished before."""
    index = calibrated.block.index
    finished = store.load(index) if store else None
    if finished is not None:
        tensors, record = finished
        adapters = list(Plan.from_json(record["plan"]).adapters)
        reports = [AdapterReport(**{**entry, "names": tuple(entry["names"])}) for entry in record["reports"]]
        return tensors, adapters, reports
    adapters = [with_threshold(calibrated, adapter) for adapter in choose(calibrated)]
    tensors = block_tensors(calibrated, adapters)
    reports = [measure(calibrated, adapter) for adapter in adapters if adapter.kind != "dense"]
    if store:
        record = {"plan": Plan(tuple(adapters)).to_json(), "reports": [asdict(report) for report in reports]}
        store.save(index, tensors, record)
    return tensors, adapters, reports
