"""Compression: calibrate, plan, then put modules in place, one block at a time.

A method that plans block by block decomposes each linear once. A method with one budget for the whole model
decomposes every linear before it decides, and the chosen ones again for their modules: to keep all factors
would take the memory of two more models. A block's factors are dropped when its modules are in place, so
there are never two copies of the model. Only linears are replaced: embeddings and norms stay, and in 16 bits
the weights of dense linears stay too. In 8 and 4 bits, every weight of a block is rounded when the
block's adapters are computed. lm_head comes last, as a block of its own.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rana_kernels.allocation.cost import reduction
from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.method import Chooser, chooser_of
from rana_kernels.allocation.methods import DEFAULT, METHODS, make_request, needs, prepare
from rana_kernels.allocation.request import formats
from rana_kernels.allocation.search import Search
from rana_kernels.checkpoint.attachment import attach_plan
from rana_kernels.checkpoint.resume import ResumeDir, fingerprint
from rana_kernels.compression.report import (
    AdapterReport,
    CompressReport,
    block_bytes,
    facts_of,
    head_bytes,
    measure,
    model_bytes,
    model_flops_reduction,
    read_bytes,
)
from rana_kernels.model.admission import admit, require_dense
from rana_kernels.model.architectures import Block, describe, find_blocks
from rana_kernels.model.head import require_head, untie_head
from rana_kernels.model.install import check_adapter, check_plan, dense_names, install_block
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.model.quantized import forget_quantizer
from rana_kernels.nn.dense import serve_dense
from rana_kernels.nn.format import FLOAT, Format
from rana_kernels.quantization.block import quantize_block
from rana_kernels.quantization.moments import INPUTS
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats, calibrate_blocks
from rana_kernels.statistics.tensors import block_tensors, with_threshold
from rana_kernels.system.files import check_writable
from rana_kernels.system.huge_pages import use_huge_pages
from rana_kernels.system.progress import track
from rana_kernels.system.torch_state import plain_torch


@plain_torch()
def compress(
    model: nn.Module,
    calibration: Iterable | None = None,
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
    plan: Plan | None = None,
    stats: Stats | None = None,
    patterns: Mapping[str, Any] | None = None,
    resume_dir: str | PathLike | None = None,
    progress: bool = True,
) -> CompressReport:
    """Replace the linears of `model`'s blocks by adapters, in place.

    calibration       as in `calibrate`. Give this or `stats`
    flops_reduction   the fraction to save of the FLOPs of the blocks' linears, by `method`. Give this,
                      `time_reduction`, `bytes_reduction` or a `plan`
    time_reduction    the fraction to save of the time that these linears take for one token
    times             the measured times that `time_reduction` refers to
    max_memory        the bytes that these linears may store (weights, biases, thresholds, norms)
    bytes_reduction   the fraction to save of the bytes that a token reads in these linears and lm_head,
                      against the floats of the model. lm_head may then get a mask, too
    bits              of the weights: 16 (floats of the model's dtype), 8 or 4. They are rounded by GPTQ
                      (arXiv 2210.17323) under the second moments of the calibration. "auto", with
                      `bytes_reduction`: every linear gets the bits that lose least, together with its mask
    group             columns of a weight that share a scale in 8 and 4 bits: 32, 64, 128, or None for a whole
                      row
    lm_head_bits      of the weight of lm_head. None: like `bits`. An lm_head that is tied to the embedding
                      gets a quantised copy, and the embedding stays as it is
    search            for `method="rankadaptor"`: token ids to measure on that the calibration does not have
    plan              the adapters to make, with their bits. Missing thresholds are chosen from the sample
    patterns          for a model of an unknown architecture: the fields of
                      `rana_kernels.model.architectures.Architecture` that name its linears. Token ids must be
                      the first argument of its forward
    resume_dir        keeps finished blocks. After an interruption load the original model again, and the same
                      call continues from there

    Raises ValueError for arguments that contradict each other or the model, and OSError for a `resume_dir`
    that cannot be written, before the model is changed.
    """
    started, model = time.monotonic(), admit(model, changes=True)
    if resume_dir is not None:
        check_writable(Path(resume_dir))
    if patterns is not None:
        describe(model, patterns)
    if (calibration is None) == (stats is None):
        raise ValueError("compress: wanted exactly one of calibration and stats")
    if stats is not None and stats.model is not model:
        raise ValueError("compress: the statistics are of another model object than the one given")
    blocks = stats.blocks if stats is not None else find_blocks(model)
    require_dense(model, blocks)
    asked = {
        "flops_reduction": flops_reduction, "time_reduction": time_reduction, "times": times,
        "max_memory": max_memory, "bytes_reduction": bytes_reduction, "search": search,
    }  # fmt: skip
    target = _target(model, blocks, plan, method, asked, formats(model, bits, group, lm_head_bits))
    if stats is None:
        assert calibration is not None
        stats = calibrate_blocks(model, blocks, calibration, **target.needs, progress=progress)
    stats.require(target.needs["inputs"])
    facts = (stats.digest, target.description, *([search.digest] if search else []))
    made = {"model, calibration or request": fingerprint(model, blocks, *facts)}
    store = ResumeDir(resume_dir, made) if resume_dir else None
    bytes_before, block_bytes_before = model_bytes(model), block_bytes(model, blocks)
    read_bytes_before = block_bytes_before + head_bytes(model)
    itemsize = linear_of(model, blocks[0].linears[0]).weight.element_size()
    choose = target.prepare(stats, store, progress)
    adapters, measured = _compress_blocks(stats, stats.blocks, choose, store, progress)
    done = target.start.with_adapters(tuple(adapters))
    if target.head and stats.head is not None:
        (own,), of_head = _compress_blocks(stats, [stats.head], choose, store, progress=False)
        done, measured = replace(done, lm_head=own if own.changes else None), measured + of_head
    if done.lm_head is not None:
        untie_head(model)
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
        read_bytes_before=read_bytes_before,
        read_bytes_after=read_bytes(model, done, itemsize),
        block_time_reduction=reduction(times, done) if times else None,
        seconds=time.monotonic() - started,
    )
    if hasattr(model, "config"):  # model.save_pretrained then writes a checkpoint that can be loaded
        forget_quantizer(model)
        attach_plan(model, done, facts_of(model, stats, report))
    return report


@dataclass(frozen=True)
class _Target:
    """What decides the adapters: a plan, or a method at its budget.

    needs         the arguments of `calibrate`
    description   all that the outcome depends on besides the model and the statistics
    start         the plan that gets the finished adapters
    head          whether lm_head may be replaced
    prepare       makes the chooser from the statistics, the store and whether to show progress
    """

    needs: dict[str, Any]
    description: str
    start: Plan
    head: bool
    prepare: Callable[[Stats, ResumeDir | None, bool], Chooser]


def _target(
    model: nn.Module,
    blocks: list[Block],
    plan: Plan | None,
    method: str,
    asked: dict[str, Any],
    formats: tuple[tuple[Format, ...], tuple[Format, ...]],
) -> _Target:
    """Check what is asked for against the model. Raise ValueError if the two do not fit."""
    own, head = formats
    if plan is None:
        request = make_request(method, **asked, formats=own, lm_head_formats=head)
        METHODS[method].check(model, blocks, request)

        def prepare_own(stats: Stats, store: ResumeDir | None, progress: bool) -> Chooser:
            return prepare(stats, request, store, progress)

        wanted = needs(request, model)
        return _Target(wanted, repr(request), request.record(), request.changes_head, prepare_own)
    given = [name for name, value in asked.items() if value is not None]
    given += ["bits"] if (own, head) != ((FLOAT,), (FLOAT,)) else []
    if given:
        raise ValueError(f"compress: a plan is given, and {', '.join(given)}: wanted exactly one of them")
    found = _needs_of(check_plan(model, blocks, plan), plan)
    if plan.lm_head is not None:
        check_adapter(model, require_head(model), plan.lm_head)
    return _Target(found, plan.to_json(), plan, plan.lm_head is not None, lambda *_: chooser_of(plan))


def _needs_of(planned: list[tuple[Block, list[AdapterSpec]]], plan: Plan) -> dict[str, Any]:
    """Return the arguments of `calibrate` for a plan.

    A neuron adapter of down needs only the input of the MLP, from which that of down is computed.
    """
    needed = {"mlp", *(INPUTS if any(a.format.quantized for a in plan.adapters) else ())}
    for block, adapters in planned:
        for adapter in adapters:
            name = next(key for key, readers in block.inputs.items() if adapter.names[0] in readers)
            if adapter.kind == "rank" or (adapter.kind == "neuron" and name != "down"):
                needed.add(name)
    needed |= {"lm_head"} if plan.lm_head is not None else set()
    return {"inputs": tuple(sorted(needed)), "gradients": any(a.metric == "loss" for a in plan.all_adapters)}


def _compress_blocks(
    stats: Stats, blocks: list[Block], choose: Chooser, store: ResumeDir | None, progress: bool
) -> tuple[list[AdapterSpec], list[AdapterReport]]:
    """Replace the linears of these blocks. Return the adapters and their measurements."""
    adapters: list[AdapterSpec] = []
    measured: list[AdapterReport] = []
    for block in track(blocks, "compressing", progress):
        tensors, found, reports = _compress_block(CalibratedBlock(stats.model, block, stats), choose, store)
        install_block(stats.model, block, found, tensors)
        adapters += found
        measured += reports
    return adapters, measured


def _compress_block(
    calibrated: CalibratedBlock, choose: Chooser, store: ResumeDir | None
) -> tuple[dict[str, Tensor], list[AdapterSpec], list[AdapterReport]]:
    """Return tensors, adapters and measurements of one block, from `store` if it has the block."""
    index = calibrated.block.index
    finished = store.load(index) if store else None
    if finished is not None:
        tensors, record = finished
        adapters = list(Plan.from_json(record["plan"]).adapters)
        reports = [AdapterReport(**{**entry, "names": tuple(entry["names"])}) for entry in record["reports"]]
        return tensors, adapters, reports
    adapters = [with_threshold(calibrated, adapter) for adapter in choose(calibrated)]
    tensors = quantize_block(calibrated, adapters, block_tensors(calibrated, adapters))
    reports = [measure(calibrated, adapter) for adapter in adapters if adapter.kind != "dense"]
    if store:
        record = {"plan": Plan(tuple(adapters)).to_json(), "reports": [asdict(report) for report in reports]}
        store.save(index, tensors, record)
    return tensors, adapters, reports
