"""`rana eval`."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.cli.lengths import read_rows, row_length
from rana_kernels.cli.options import (
    AsJson,
    Budget,
    Checkpoint,
    Dtype,
    SequenceLength,
    app,
    dtype_name,
    open_compressed,
    open_model,
    open_tokenizer,
    print_json,
)
from rana_kernels.cli.tables import show_evaluation
from rana_kernels.cli.tokens import find_files
from rana_kernels.compression.report import head_bytes, model_bytes
from rana_kernels.evaluation import metrics
from rana_kernels.evaluation.density import MARGIN, costs_of, planned_live
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.examples import Predictions, costs_of_predictions
from rana_kernels.evaluation.live import LiveCount, count_live
from rana_kernels.model.plan import Plan
from rana_kernels.statistics.thresholds import evenly

LIVE_TOKENS = 16384  # for the count of kept rows: with fewer, the mean depends on the choice of documents
EXAMPLES = 5
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


@app.command(
    "eval",
    epilog="""\b
Example:
  rana eval llama-rana --text test.txt --against meta-llama/Llama-3.2-1B
Compare perplexities only on the same file and sequence length.""",
)
def evaluate_model(
    directory: Checkpoint,
    text: Annotated[
        Path,
        typer.Option(
            help="Measure on this text (UTF-8), or on a .safetensors file with input_ids [n, T]. Do not use "
            "the calibration text."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="The dense model: a directory, GGUF file or hub name. It is measured too, and the "
            "predictions are compared with its own."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many tokens of the text. Default: all.")
    ] = None,
    sequence_length: SequenceLength = None,
    budget: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, tokens a second, and how many rows the masks keep.

    The tables show how the kept rows spread over tokens, and the tokens that keep most. A warning appears if
    the masks keep clearly more or fewer rows than planned.
    """
    find_files(text)
    model = open_compressed(directory, budget)
    tokenizer = open_tokenizer(directory)
    token_ids = read_rows(model, text, tokenizer, row_length(model, sequence_length), tokens)
    original = None if against is None else open_model(against, Dtype(dtype_name(model)))
    dense = None if original is None else _measure(original, token_ids)
    found = _measure(model, token_ids)
    # evenly spaced sequences, because neighbours come from the same document
    some = token_ids[evenly(token_ids.numel(), LIVE_TOKENS)]
    with count_live(model) as counts:
        losses = metrics.token_losses(model, some)
    dense_losses = None if original is None else metrics.token_losses(original, some)
    compared = None if original is None else asdict(divergence(model, original, some))
    plan = attached_plan(model)
    assert plan is not None, "load gives models with a plan"
    density = _density(plan, counts)
    facts = {
        "model": found,
        "dense": dense,
        "divergence": compared,
        "density": density,
        "adapters": _adapters(plan, counts),
        "bits": plan.bits,
        "lm_head_bits": plan.lm_head_bits,
        "stored_bytes": model_bytes(model),
        "read_bytes": _read_bytes(model, plan, counts),
        **_examples(plan, counts, some, losses, dense_losses, tokenizer),
    }
    print_json(facts) if as_json else show_evaluation(facts, plan)
    _warn(density)


def _measure(model: Any, token_ids: Tensor) -> dict[str, float]:
    found = metrics.perplexity(model, token_ids)
    half = max(1, min(64, token_ids.shape[1] // 2))
    return {
        **asdict(found),
        "decode_tokens_per_second": metrics.decode_speed(model, token_ids[:1, :half], half),
    }


def _density(plan: Plan, counts: dict[str, LiveCount]) -> dict[str, Any]:
    """Return the cost as a fraction of the dense cost: planned, measured, and its quantiles over tokens."""
    costs = costs_of(plan)
    cost_ratio = costs.cost_ratio_of_tokens(counts)
    return {
        "planned": 1 - plan.reduction,
        "measured": float(cost_ratio.mean()),
        "drift": costs.drift(counts, planned_live(plan)),
        "margin": MARGIN,
        "tokens": {name: float(torch.quantile(cost_ratio, share)) for name, share in QUANTILES.items()},
    }


def _read_bytes(model: Any, plan: Plan, counts: dict[str, LiveCount]) -> float:
    """Return the mean bytes that a token of this text reads in the linears of the blocks and lm_head."""
    itemsize, total = model.dtype.itemsize, 0.0 if plan.lm_head else float(head_bytes(model))
    for adapter in plan.all_adapters:
        count = counts.get(adapter.names[0])
        measured = adapter if count is None else replace(adapter, live=count.mean)
        total += measured.read_bytes(itemsize)
    return total


def _adapters(plan: Plan, counts: dict[str, LiveCount]) -> list[dict[str, Any]]:
    """Return for each adapter its stored rows and its live rows: planned, measured, and their quantiles."""
    found = []
    for adapter in plan.adapters:
        if adapter.kind != "dense":
            count = counts[adapter.names[0]]
            spread = dict(zip(QUANTILES, count.quantiles(*QUANTILES.values()), strict=True))
            sizes = {"rank": adapter.rank, "planned": adapter.live, "live": count.mean}
            found.append({"names": adapter.names, "kind": adapter.kind, **sizes, **spread})
    return found


def _examples(
    plan: Plan,
    counts: dict[str, LiveCount],
    token_ids: Tensor,
    losses: Tensor,
    dense: Tensor | None,
    tokenizer: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Return the tokens that keep most, and with a dense model the predictions that lose most against it."""
    cost_ratio = costs_of_predictions(costs_of(plan).cost_ratio_of_tokens(counts), token_ids)
    predictions = Predictions(token_ids, cost_ratio, losses, dense, tokenizer)
    most = {"cost_most": predictions.where_most(cost_ratio, EXAMPLES)}
    if dense is not None:
        most["lose_most"] = predictions.where_most(losses - dense, EXAMPLES)
    return {name: [asdict(example) for example in found] for name, found in most.items()}


def _warn(density: dict[str, Any]) -> None:
    """Print a warning if the masks keep more or fewer rows than planned, beyond the margin."""
    drift = density["drift"]
    if abs(drift) > MARGIN:
        print(
            f"rana: warning: on this text the masks keep {abs(drift):.1%} {'more' if drift > 0 else 'fewer'} "
            f"rows than planned (cost {density['measured']:.3f}, planned {density['planned']:.3f}); text "
            f"like the calibration text stays within {MARGIN:.1%}. Calibrate on text like this one",
            file=sys.stderr,
        )
