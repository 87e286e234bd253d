"""What a mean hides: kept rows from token to token, the tokens that lose most, and text of another kind.

Two kinds of text, that which the model was measured on and prose, and each calibrates a compression that
both are then read with. The budget is what is asked for: nothing is fitted to a text here.
"""

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from bench.quality.contenders import CONTENDERS, Candidate
from bench.quality.measure import QUANTILES, Measured, measure
from bench.quality.subject import Subject, some_rows
from rana_kernels.evaluation.density import planned_live
from rana_kernels.evaluation.examples import Predictions, costs_of_predictions

SPOTS = 8


def spread(subject: Subject, other: Subject, method: str, keep: float, tokens: int) -> dict[str, Any]:
    """How `method`, asked for `keep`, does on `tokens` tokens of the texts of two subjects with one model.

    {"texts": a reading for each pair of calibration and text, "adapters": kept rows of each on its own
    kind of text, "keep_most" and "lose_most": spots}; the latter calibrated on the first subject.
    """
    texts = {"own": some_rows(subject.evaluation, tokens), "prose": some_rows(other.evaluation, tokens)}
    dense = {name: measure(subject.dense, text) for name, text in texts.items()}
    made = {"own": subject, "prose": other}
    readings, detail = [], {}
    for calibrated, source in made.items():
        candidate = CONTENDERS[method](source, "both", keep)
        for name, text in texts.items():
            found = measure(candidate.model, text)
            readings.append(
                {"calibrated": calibrated, "read": name, **reading(candidate, found, dense[name])}
            )
            if calibrated == name == "own":
                detail = details(subject, candidate, found, dense[name], text)
    return {"texts": readings, **detail}


def reading(candidate: Candidate, found: Measured, dense: Measured) -> dict[str, Any]:
    """Cost against the plan's, and the loss above the dense model's, in the mean and where it is largest."""
    assert candidate.plan is not None
    more = (found.losses - dense.losses).flatten()
    return {
        "over_dense": found.perplexity / dense.perplexity - 1,
        "planned": 1 - candidate.plan.reduction,
        "keep": candidate.costs.cost_ratio(found.counts),
        "drift": candidate.costs.drift(found.counts, planned_live(candidate.plan)),
        "tokens": found.spread(candidate.costs),
        "more_loss": {name: float(more.quantile(share)) for name, share in QUANTILES.items()},
    }


def details(
    subject: Subject, candidate: Candidate, found: Measured, dense: Measured, rows: Tensor
) -> dict[str, Any]:
    assert candidate.plan is not None
    keep = costs_of_predictions(candidate.costs.cost_ratio_of_tokens(found.counts), rows)
    field = Predictions(rows, keep, found.losses, dense.losses, subject.tokenizer)
    adapters = []
    for adapter in candidate.plan.adapters:
        if adapter.kind != "dense":
            count = found.counts[adapter.names[0]]
            kept = dict(zip(QUANTILES, count.quantiles(*QUANTILES.values()), strict=True))
            adapters.append({"names": adapter.names, "rank": adapter.rank, "planned": adapter.live, **kept})
    return {
        "adapters": adapters,
        "keep_most": [asdict(spot) for spot in field.where_most(keep, SPOTS)],
        "lose_most": [asdict(spot) for spot in field.where_most(found.losses - dense.losses, SPOTS)],
    }


def in_prose(subject: Subject) -> Subject:
    """The same model with prose for its texts: the first half to calibrate on, the rest to read."""
    assert subject.prose is not None
    half = len(subject.prose) // 2
    return replace(subject, calibration=subject.prose[:half], evaluation=subject.prose[half:])
