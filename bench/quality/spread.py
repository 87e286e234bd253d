"""The spread behind the means: live rows token by token, the tokens that lose most, and another kind of text.

There are two kinds of text: the one the model was measured on, and prose. Each calibrates a compression,
which then reads both. The budget is given as it is, and not fitted to a text.
"""

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from bench.quality.contenders import CONTENDERS
from bench.quality.measure import QUANTILES, Measured, measure
from bench.quality.subject import Candidate, Subject, some_rows
from rana_kernels.evaluation.density import planned_live
from rana_kernels.evaluation.examples import Predictions, costs_of_predictions

EXAMPLES = 8


def spread(subject: Subject, other: Subject, method: str, cost_ratio: float, tokens: int) -> dict[str, Any]:
    """Measure `method` at `cost_ratio` on `tokens` tokens of the texts of two subjects with one model.

    Return {"texts": a reading for each pair of calibration and text, "adapters": live rows of each adapter,
    "cost_most" and "lose_most": examples}. All but the first have the first subject for calibration and text.
    """
    texts = {"own": some_rows(subject.evaluation, tokens), "prose": some_rows(other.evaluation, tokens)}
    dense = {name: measure(subject.dense, text) for name, text in texts.items()}
    made = {"own": subject, "prose": other}
    readings, detail = [], {}
    for calibrated, source in made.items():
        candidate = CONTENDERS[method](source, "both", cost_ratio)
        for name, text in texts.items():
            found = measure(candidate.model, text)
            readings.append(
                {"calibrated": calibrated, "read": name, **reading(candidate, found, dense[name])}
            )
            if calibrated == name == "own":
                detail = details(subject, candidate, found, dense[name], text)
    return {"texts": readings, **detail}


def reading(candidate: Candidate, found: Measured, dense: Measured) -> dict[str, Any]:
    """Return the cost beside the plan's, and the loss above the dense model's, with quantiles."""
    assert candidate.plan is not None
    more = (found.losses - dense.losses).flatten()
    return {
        "over_dense": found.perplexity / dense.perplexity - 1,
        "planned": 1 - candidate.plan.reduction,
        "cost_ratio": candidate.costs.cost_ratio(found.counts),
        "drift": candidate.costs.drift(found.counts, planned_live(candidate.plan)),
        "tokens": found.spread(candidate.costs),
        "more_loss": {name: float(more.quantile(share)) for name, share in QUANTILES.items()},
    }


def details(
    subject: Subject, candidate: Candidate, found: Measured, dense: Measured, token_ids: Tensor
) -> dict[str, Any]:
    assert candidate.plan is not None
    costs = costs_of_predictions(candidate.costs.cost_ratio_of_tokens(found.counts), token_ids)
    predictions = Predictions(token_ids, costs, found.losses, dense.losses, subject.tokenizer)
    adapters = []
    for adapter in candidate.plan.adapters:
        if adapter.kind != "dense":
            count = found.counts[adapter.names[0]]
            live = dict(zip(QUANTILES, count.quantiles(*QUANTILES.values()), strict=True))
            adapters.append({"names": adapter.names, "rank": adapter.rank, "planned": adapter.live, **live})
    return {
        "adapters": adapters,
        "cost_most": [asdict(e) for e in predictions.where_most(costs, EXAMPLES)],
        "lose_most": [asdict(e) for e in predictions.where_most(found.losses - dense.losses, EXAMPLES)],
    }


def in_prose(subject: Subject) -> Subject:
    """Return the same model with prose for its texts: one half to calibrate on, and one to read."""
    assert subject.prose is not None
    half = len(subject.prose) // 2
    return replace(subject, calibration=subject.prose[:half], evaluation=subject.prose[half:])
