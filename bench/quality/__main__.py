"""The command: `python -m bench.quality`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from bench.__main__ import RESULTS, conditions
from bench.quality.contenders import CONTENDERS
from bench.quality.fit import fit
from bench.quality.layers import kept_energy
from bench.quality.measure import Row, fill, measure
from bench.quality.store import Store
from bench.quality.subject import SCOPES, Subject, open_subject

ROOT = Path(__file__).resolve().parent.parent.parent
LAYER_ROWS = 8  # on which layers are compared
console = Console()


def main(
    model: Annotated[
        str, typer.Argument(help="A model's directory or hub id.", show_default="examples/demo_model")
    ] = str(ROOT / "examples" / "demo_model"),
    calibration: Annotated[
        Path | None, typer.Option(help="Text or .safetensors; default calibration.safetensors in the model.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Text or .safetensors; default evaluation.safetensors in the model.")
    ] = None,
    budget: Annotated[
        list[float], typer.Option(min=0.05, max=0.95, help="Cost to keep; give it several times for several.")
    ] = [0.70, 0.56, 0.45, 0.35, 0.25],  # noqa: B006 - typer wants a list
    method: Annotated[list[str], typer.Option(help="Which contenders; several times for several.")] = list(  # noqa: B006
        CONTENDERS
    ),
    tokens: Annotated[int, typer.Option(min=2, help="At most so many, of each text.")] = 102_400,
    ablation_tokens: Annotated[
        int, typer.Option(min=2, help="Of the evaluation text, where only MLPs or attention are compressed.")
    ] = 16_384,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a row where a file is text.")] = 512,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default bench/results/quality-<model>.json.")
    ] = None,
) -> None:
    """Measure what skipping work costs in perplexity, for every method, at equal cost.

    Each method is asked for what comes, measured in multiply-adds on the evaluation text, to the budget:
    B, and linears left dense, count. Then: the same with only the MLPs or only attention compressed.

    Results go to the JSON file as they are found, and a run that was interrupted goes on from it.

    Example:  python -m bench.quality path/to/model --calibration a.txt --evaluation b.txt --budget 0.5
    """
    logging.disable_progress_bar()
    subject = open_subject(model, calibration, evaluation, tokens, sequence_length)
    path = output or RESULTS / f"quality-{subject.name}.json"
    store = Store(path, subject, conditions())
    for scope in SCOPES:
        share = 1.0 if scope == "both" else ablation_tokens / subject.evaluation.numel()
        compare(subject, store, scope, budget, method, _spread_out(subject.evaluation, share))


def compare(
    subject: Subject, store: Store, scope: str, budgets: list[float], methods: list[str], rows: Tensor
) -> None:
    """The rows of one scope that are not in the store yet."""
    wanted = [
        Row(scope, method, False, budget)
        for budget in budgets
        for method in methods
        if not store.has("rows", f"{scope} {method} {budget:.2f}")
    ]
    if not wanted:
        return
    if not store.has("dense", scope):
        found = measure(subject.dense, rows)
        store.put("dense", scope, {"perplexity": found.perplexity, "predictions": found.losses.numel()})
    dense = store.section("dense")[scope]["perplexity"]
    for row in wanted:
        with console.status(f"{scope}: {row.method} at {row.budget}"):
            evaluate(subject, row, rows, dense)
        console.print(line(row), highlight=False)
        store.put("rows", f"{scope} {row.method} {row.budget:.2f}", asdict(row))


def evaluate(subject: Subject, row: Row, rows: Tensor, dense: float) -> None:
    """Fill `row` in; a budget that the method cannot meet is a result too."""
    try:
        candidate, asked = fit(
            lambda keep: CONTENDERS[row.method](subject, row.scope, keep), row.budget, rows
        )
    except ValueError as error:
        row.failed = str(error)
        return
    fill(row, candidate, asked, rows, dense)
    row.layers = kept_energy(subject, candidate.model, _spread_out(rows, LAYER_ROWS / len(rows)))


def line(row: Row) -> str:
    where = f"{row.scope:9} {row.method:12} {row.budget:.2f}  "
    if row.failed:
        return where + row.failed
    return where + f"cost {row.keep:.3f}  perplexity {row.perplexity:.3f}  {row.over_dense:+.2%}"


def _spread_out(rows: Tensor, share: float) -> Tensor:
    """That share of the rows, at least one, spread over the text."""
    count = max(1, min(len(rows), round(share * len(rows))))
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


if __name__ == "__main__":
    typer.run(main)
