"""The command: `python -m bench.quality`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from bench.quality import smollm2
from bench.quality.plots import draw
from bench.quality.run import Settings, run
from bench.quality.store import Store
from bench.quality.subject import open_subject
from bench.quality.tables import page
from bench.report.results import RESULTS, ROOT, conditions, write
from rana_kernels.cli.options import Dtype

DEFAULT = Settings()


def main(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's directory or hub id, or smollm2: a real model, which is downloaded into build/.",
            show_default="examples/demo_model",
        ),
    ] = str(ROOT / "examples" / "demo_model"),
    calibration: Annotated[
        Path | None, typer.Option(help="Text or .safetensors; default: calibration.safetensors of the model.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Text or .safetensors; default: evaluation.safetensors of the model.")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            min=0.05,
            max=0.95,
            help="Cost, dense = 1; several times for several.",
            show_default="0.70 to 0.25",
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A contender; default all; several times for several.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most so many of each text.")] = 102_400,
    evaluation_tokens: Annotated[
        int | None, typer.Option(min=2, help="So many of the evaluation text instead, spread over it.")
    ] = None,
    read: Annotated[
        list[float] | None,
        typer.Option(
            min=0.05,
            max=0.95,
            help="Bytes that a token reads, those in 16 bits = 1, for weights of few bits; several times for "
            "several.",
            show_default="8.5, 6.4, 4.5, 4, 3.5 and 3 bits a weight",
        ),
    ] = None,
    ablation_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Evaluation tokens where only MLPs or only attention are compressed; 0: leave it out."
        ),
    ] = DEFAULT.ablation_tokens,
    spread_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of each kind of text, for the spread of live rows; 0: leave it out."
        ),
    ] = DEFAULT.spread_tokens,
    recovery_steps: Annotated[
        int, typer.Option(min=0, help="Steps to train each model with PEFT; 0: none.")
    ] = DEFAULT.recovery_steps,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a row, if a file is text.")] = 512,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights. float32 is fastest on a processor without bfloat16.")
    ] = Dtype.auto,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default bench/results/quality-<model>.json.")
    ] = None,
) -> None:
    """Measure what skipping work costs in quality, for every method at equal cost.

    Quality is faithfulness to the dense model (KL and equal first choices), and perplexity.

    The cost of each method, measured in multiply-adds on the evaluation text, is fitted to the budget. B and
    linears left dense count. Then only the MLPs or only attention are compressed. Then weights are rounded
    to 8, 4 and 3 bits, with and without masks, at equal bytes. Last, live rows are measured token by token,
    and on another kind of text (prose: the language reference that every Python carries).

    Results go to the JSON file one by one, and an interrupted run goes on from it. Tables (.md) and plots
    (.png) are written beside it.

    Example:  python -m bench.quality path/to/model --calibration a.txt --evaluation b.txt --budget 0.5
    """
    logging.disable_progress_bar()
    console = Console()
    try:
        place = str(smollm2.fetch()) if model == smollm2.NAME else model
        subject = open_subject(
            place, calibration, evaluation, tokens, sequence_length, dtype, evaluation_tokens
        )
        path = output or RESULTS / f"quality-{subject.name}.json"
        store = Store(path, subject, conditions())
        settings = Settings(
            tuple(budget or DEFAULT.budgets),
            tuple(read or DEFAULT.reads),
            tuple(method or DEFAULT.methods),
            ablation_tokens,
            spread_tokens,
            recovery_steps,
        )
        run(subject, store, settings, console)
    except (ValueError, OSError, ImportError) as error:
        console.print("[red]error:[/red]", escape(str(error)))
        raise typer.Exit(1) from None
    write(path.with_suffix(".md"), page(store.data, path.stem))
    plots = draw(store.data, path)
    console.print(f"wrote {', '.join(map(str, (path, path.with_suffix('.md'), *plots)))}")


if __name__ == "__main__":
    typer.run(main)
