"""The cost of compression: perplexity and live rows of the model at several budgets, by three methods.

`global` is RaNA with one budget for the whole model, and `paper` is RaNA as published (arXiv 2503.18216).
`static` is plain data-aware low rank at the same cost; comparing with it shows what choosing ranks by input
is worth.

Calibration and the curves of `global` do not depend on the budget, so both are computed once. Each
compression starts from a copy of the dense model.
"""

from collections.abc import Callable

from torch import Tensor

from bench.quality.contenders import CONTENDERS, Candidate
from bench.quality.subject import BATCH, Subject, some_rows
from examples.demo.model import DemoModel
from examples.demo.results import Adapted, Quality, Variant
from rana_kernels.compression.report import AdapterReport
from rana_kernels.evaluation.metrics import count_live_rows, perplexity

METHODS = ("global", "paper", "static")
Compressed = dict[tuple[str, float], Candidate]  # by method and budget
LIVE_ROWS = 8  # counting is slow, and a mean over a few thousand tokens is steady enough


def subject_of(model: DemoModel, rows: int) -> Subject:
    """Return the model with its texts, of which `rows` rows are for evaluation."""
    evaluation = model.evaluation[:rows].long()
    return Subject("demo", model.dense, model.tokenizer, model.calibration, evaluation)


def measure_quality(
    subject: Subject, budgets: tuple[float, ...], say: Callable[[str], None]
) -> tuple[Quality, Compressed]:
    """Compress by each method at each budget (a `flops_reduction`), and evaluate.

    Return the results, and the compressed models.
    """
    dense, evaluation = subject.dense, subject.evaluation
    say("calibrating")
    tokens = subject.stats.tokens
    say("measuring what each multiply-add is worth")
    assert subject.curves
    say("perplexity of the dense model")
    quality = Quality(
        parameters=sum(p.numel() for p in dense.parameters()),
        calibration_tokens=tokens,
        evaluation_tokens=evaluation.numel(),
        perplexity=perplexity(dense, evaluation, batch=BATCH, progress=False).perplexity,
        megabytes=sum(p.numel() * p.element_size() for p in dense.parameters()) / 1e6,
    )
    compressed: Compressed = {}
    for method, budget in ((method, budget) for budget in budgets for method in METHODS):
        say(f"{method} at {budget:.0%} fewer FLOPs")
        candidate = CONTENDERS[method](subject, "both", 1 - budget)
        compressed[method, budget] = candidate
        quality.variants.append(_evaluate(candidate, method, budget, evaluation, quality.perplexity))
    return quality, compressed


def _evaluate(candidate: Candidate, method: str, budget: float, evaluation: Tensor, dense: float) -> Variant:
    found = perplexity(candidate.model, evaluation, batch=BATCH, progress=False).perplexity
    some = some_rows(evaluation, LIVE_ROWS * evaluation.shape[1])
    counts = count_live_rows(candidate.model, some, batch=BATCH, progress=False)
    report = candidate.report
    assert report is not None
    return Variant(
        method=method,
        flops_reduction=budget,
        planned_cost_ratio=1 - report.block_flops_reduction,
        cost_ratio=candidate.costs.cost_ratio(counts),
        perplexity=found,
        over_dense=found / dense - 1,
        megabytes=report.bytes_after / 1e6,
        seconds=report.seconds,
        adapters=[_adapted(adapter, counts[adapter.names[0]].mean) for adapter in report.adapters],
    )


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
