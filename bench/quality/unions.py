"""Rows that several tokens read together, with the masks of a real model: `python -m bench.quality.unions`.

An op reads a row once for all tokens that keep it. Random masks have few rows in common, so benchmarks with
them read nearly all rows from four tokens on. This measures what the masks of SmolLM2 have in common: for
tokens that follow one another, as in a draft, and for tokens of different texts, as in a batch.
"""

from collections import defaultdict
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import rana_kernels as rana
from bench.quality import smollm2
from bench.quality.neurons import compressed
from bench.report.results import RESULTS, Row, conditions, write_csv
from bench.report.tables import show
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.evaluation.density import costs_of
from rana_kernels.evaluation.live import watch_masks

BUDGETS = (0.8, 0.7, 0.56)
TOKENS = (1, 2, 4, 8, 16)
TEXTS, LENGTH = 16, 256  # texts that are read, and tokens of each
KINDS = ("one text", "several texts", "random")
console = Console(width=160)


def main(
    calibration: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
) -> None:
    """Compress SmolLM2, read texts, and write the shares of the rows that several tokens keep together."""
    stamp = conditions()
    folder = smollm2.fetch()
    model = compressed(folder, 16, calibration)
    texts = smollm2.read_text(folder, "evaluation")[:TEXTS, :LENGTH]
    found = [row for budget in BUDGETS for row in measure_unions(model, texts, budget)]
    show(console, "shares of the rows that so many tokens read together", found)
    path = RESULTS / f"unions-{smollm2.NAME}.csv"
    write_csv(path, stamp, found)
    console.print(f"wrote {path}")


@torch.inference_mode()
def measure_unions(model: nn.Module, token_ids: Tensor, budget: float) -> list[Row]:
    """Return the shares of rows that TOKENS tokens of `token_ids` [TEXTS, LENGTH] read together at a budget.

    Rows count by their multiply-adds. "random" is what tokens would read that keep as many rows of each
    adapter, each for itself.
    """
    rana.set_budget(model, budget)
    weights = costs_of(attached_plan(model)).row
    sums: dict[tuple[int, str], float] = defaultdict(float)
    whole = 0.0

    def see(name: str, mask: Tensor) -> None:  # mask [TEXTS, LENGTH, rows]
        nonlocal whole
        if name not in weights:  # joint with another linear, which counts for both
            return
        weight = weights[name] * mask.shape[-1]
        whole += weight
        live = _share(mask)
        for count in TOKENS:
            sums[count, "one text"] += weight * _share(mask.unflatten(1, (-1, count)).any(2))
            sums[count, "several texts"] += weight * _share(mask.unflatten(0, (-1, count)).any(1))
            sums[count, "random"] += weight * (1 - (1 - live) ** count)

    with watch_masks(model, see):
        model(token_ids)
    return [
        {"budget": budget, "tokens": count, **{kind: round(sums[count, kind] / whole, 3) for kind in KINDS}}
        for count in TOKENS
    ]


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


if __name__ == "__main__":
    typer.run(main)
