"""Compression: calibrate → plan → modules, in place, one block at a time.

The paper's method decomposes each linear once; one budget for the whole model has to see all of them
before it can decide, so there each is decomposed again for its modules. A block's factors are dropped
when its modules are in place, so that there are never two copies of the model. Only linears are
replaced: embeddings and norms stay, and so do the weights of lm_head and of linears left dense.
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
from rana_kernels.measure import AdapterReport, CompressReport, measure, model_bytes, model_flops_reduction
from rana_kernels.methods import paper
from rana_kernels.methods.search import Search
from rana_kernels.models import describe, find_blocks
from rana_kernels.plan import Adapter, Plan
from rana_kernels.resume import ResumeDir, fingerprint


def compress(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    flops_reduction: float | None = None,
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
    _check_request(model, flops_reduction, method, search, plan)
    stats = _stats(model, calibration, stats, method, plan, progress)
    blocks = find_blocks(model)
    asked_for = plan.to_json() if plan else f"{method} {flops_reduction}"
    facts = (stats.digest, asked_for, *([search.digest] if search else []))
    store = ResumeDir(resume_dir, fingerprint(model, blocks, *facts)) if resume_dir else None
    choose = _chooser(stats, flops_reduction, method, search, store, plan, progress)
    adapters: list[Adapter] = []
    measured: list[AdapterReport] = []
    bytes_before = model_bytes(model)
    for block in track(blocks, "compressing", disable=not progress, transient=True):
        tensors, found, reports = _block(Layer(model, block, stats), choose, store)
        put(model, block, found, tensors)
        adapters += found
        measured += reports
    asked = plan or Plan((), method, flops_reduction)
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
        seconds=time.monotonic() - started,
    )
    if hasattr(model, "config"):  # so that model.save_pretrained writes what can be loaded
        attach_plan(model, done, made_from(model, stats, report))
    return report


Chooser = Callable[[Layer], list[Adapter]]
WHOLE = ("global", "rankadaptor")  # methods that see the whole model before they decide


def _check_request(
    model: nn.Module, flops_reduction: float | None, method: str, search: Search | None, plan: Plan | None
) -> None:
    """Find what cannot be done before the calibration runs."""
    if (plan is None) == (flops_reduction is None):
        raise ValueError(
            f"compress: plan is {'given' if plan else None} and flops_reduction is {flops_reduction}, "
            "wanted exactly one of them"
        )
    if plan is not None:
        check_plan(model, plan)
        return
    allocate.check_method(method, search)
    blocks = find_blocks(model)
    if method not in WHOLE:
        assert flops_reduction is not None
        paper.keep_for(model, blocks, flops_reduction, method)


def _chooser(
    stats: Stats,
    flops_reduction: float | None,
    method: str,
    search: Search | None,
    store: ResumeDir | None,
    plan: Plan | None,
    progress: bool,
) -> Chooser:
    """What decides the adapters of a block: the plan, or the method at its budget."""
    model = stats.model
    if plan is None and method in WHOLE:
        assert flops_reduction is not None
        asked: dict[str, Any] = {"flops_reduction": flops_reduction, "method": method, "search": search}
        plan = allocate.plan(stats, **asked, store=store, progress=progress)
    if plan is not None:
        planned = {block.index: adapters for block, adapters in check_plan(model, plan)}
        return lambda layer: planned[layer.block.index]
    assert flops_reduction is not None
    # layer by layer, while its factors are there: each linear is decomposed once
    keep = paper.keep_for(model, find_blocks(model), flops_reduction, method)
    return lambda layer: paper.plan_layer(layer, keep, method)


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
