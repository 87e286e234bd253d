"""What compression costs: perplexity and kept rows of the model at several budgets, by three methods.

`global` is RaNA with one budget for the whole model, `paper` RaNA as published (arXiv 2503.18216);
`static` is plain data-aware low rank at the same cost, the baseline that says what choosing ranks by
input is worth. Calibration runs once, and so do the curves that one budget is spent on: they do not
depend on the budget, and each compression starts from a copy of the dense model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor, nn

import rana_kernels as rana
from examples.demo.model import DemoModel
from examples.demo.results import Adapted, Quality, Variant
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.whole_model import model_curves, plan_curves
from rana_kernels.compression.report import AdapterReport, CompressReport
from rana_kernels.evaluation.metrics import count_live_rows, perplexity
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.calibration import Stats

METHODS = ("global", "paper", "static")
Compressed = dict[tuple[str, float], nn.Module]  # by method and budget
BATCH = 4  # rows at a time: the logits of more fall out of the caches
LIVE_ROWS = 8  # counting runs every mask twice, and a mean over a few thousand tokens is steady enough


def measure_quality(
    model: DemoModel, budgets: tuple[float, ...], rows: int, say: Callable[[str], None]
) -> tuple[Quality, Compressed]:
    """Compress by each method at each budget (a `flops_reduction`), and evaluate on `rows` rows.

    Returns what was found, and the compressed models.
    """
    evaluation = model.evaluation[:rows].long()
    say("calibrating")
    stats = rana.calibrate(model.dense, model.calibration.split(BATCH), progress=False)
    say("what each multiply-add is worth")
    curves = model_curves(stats, progress=False)
    say("perplexity of the dense model")
    quality = Quality(
        parameters=sum(p.numel() for p in model.dense.parameters()),
        calibration_tokens=stats.tokens,
        evaluation_tokens=evaluation.numel(),
        perplexity=perplexity(model.dense, evaluation, batch=BATCH, progress=False).perplexity,
        megabytes=sum(p.numel() * p.element_size() for p in model.dense.parameters()) / 1e6,
    )
    compressed: Compressed = {}
    for method, budget in ((method, budget) for budget in budgets for method in METHODS):
        say(f"{method} at {budget:.0%} fewer FLOPs")
        request = Request(method, flops_reduction=budget)
        made = plan_curves(stats, curves, request) if method == "global" else None
        compressed[method, budget], report = _compress(model.dense, stats, method, budget, made)
        found = _evaluate(compressed[method, budget], report, evaluation, quality.perplexity)
        quality.variants.append(found)
    return quality, compressed


def _compress(
    dense: nn.Module, stats: Stats, method: str, budget: float, made: Plan | None
) -> tuple[nn.Module, CompressReport]:
    """A compressed copy: `compress` works in place, and wants the statistics of the model it is given."""
    model = copy.deepcopy(dense)
    asked = {"flops_reduction": budget, "method": method} if made is None else {"plan": made}
    report = rana.compress(model, stats=replace(stats, model=model), progress=False, **asked)
    return model, report


def _evaluate(model: nn.Module, report: CompressReport, evaluation: Tensor, dense: float) -> Variant:
    found = perplexity(model, evaluation, batch=BATCH, progress=False).perplexity
    # rows apart from one another: neighbours come from the same file
    some = evaluation[:: -(-len(evaluation) // LIVE_ROWS)]
    counts = count_live_rows(model, some, batch=BATCH, progress=False)
    live = {name: count.mean for name, count in counts.items()}
    return Variant(
        method=report.plan.method,
        flops_reduction=report.plan.flops_reduction,
        planned_keep=1 - report.block_flops_reduction,
        keep=1 - _with_live(report.plan, live).reduction,
        perplexity=found,
        over_dense=found / dense - 1,
        megabytes=report.bytes_after / 1e6,
        seconds=report.seconds,
        adapters=[_adapted(adapter, live[adapter.names[0]]) for adapter in report.adapters],
    )


def _with_live(plan: Plan, live: dict[str, float]) -> Plan:
    def measured() -> Iterator[AdapterSpec]:
        for adapter in plan.adapters:
            yield replace(adapter, live=live.get(adapter.names[0], adapter.live))

    return plan.with_adapters(tuple(measured()))


def _adapted(adapter: AdapterReport, live: float) -> Adapted:
    parts = adapter.names[0].split(".")
    return Adapted(
        layer=next(int(part) for part in parts if part.isdigit()),
        linear=" ".join(name.rpartition(".")[2].removesuffix("_proj") for name in adapter.names),
        kind=adapter.kind,
        rank=adapter.rank,
        planned=adapter.live,
        live=live,
        output_error=adapter.output_error,
        spectrum=adapter.spectrum,
    )
