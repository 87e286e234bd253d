"""The command: `python -m examples.demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers.utils import logging

from examples.demo.run import Settings, run

HERE = Path(__file__).resolve().parent

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report and the compressed model.")] = Path(
        "build/demo"
    ),
    model: Annotated[
        Path,
        typer.Option(
            help="Folder with a model, its tokenizer, calibration and evaluation tokens.",
            show_default="examples/demo_model",
        ),
    ] = HERE.parent / "demo_model",
    budget: Annotated[
        list[float],
        typer.Option(
            min=0.05,
            max=0.9,
            help="Share of the FLOPs of the blocks' linears to save; several times for several.",
        ),
    ] = [0.3, 0.44, 0.55, 0.65],  # noqa: B006 - typer wants a list
) -> None:
    """Compress a small Llama model, measure what that costs, generate from it, and time real block shapes.

    It takes about two minutes on two cores and fetches nothing. In order:

    - calibrate the model once; for each budget compress copies by RaNA and by static low rank of equal cost,
      and measure their perplexity on held-out text;

    - compress once more to 4 bits, and compare bytes, perplexity and tokens a second with 16 bits;

    - save one RaNA model, load it again, and continue a prompt with it and with the dense model;

    - time the linears of a Llama-3.2-1B and a Llama-2-7B block (random weights) on one token, by dense
      PyTorch and by RaNA's kernels, and one linear at ten densities;

    - write `report.html` (tables, plots, texts; one file) and `report.json` (all numbers).

    With other budgets: `python -m examples.demo --budget 0.2 --budget 0.3`
    """
    console = Console()
    logging.disable_progress_bar()  # of transformers; ours is enough
    budgets = tuple(sorted(budget))
    # the budget to show in detail: 0.44, as in the paper's tables, or the nearest one
    show = min(budgets, key=lambda b: abs(b - 0.44))
    try:
        results = run(Settings(model, output, budgets, show), console)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from None
    console.print(f"\n{output / 'report.html'} written; {results.seconds:.0f} s in all.")


if __name__ == "__main__":
    app()
