"""Drafts from the same weights, timed on a real model: `python -m bench.decode.drafts`.

SmolLM2 in 8 bits writes without masks. The same tensors with the masks of a lower budget propose its tokens,
several at a time (Leviathan et al., arXiv 2211.17192). It writes what it would write alone, so only the time
counts, beside that of dense weights in 8 bits. It continues English prose and Python's own source.
"""

import inspect
import textwrap
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rana_kernels as rana
from bench.__main__ import require_green_tests
from bench.decode.measure import measure_drafts
from bench.decode.widths import dense
from bench.kernels.timing import thread_counts, using
from bench.quality import smollm2
from bench.quality.neurons import compressed
from bench.report.results import RESULTS, Row, conditions, processor, write_csv
from bench.report.tables import show
from rana_kernels.integrations.decoding import quicken
from rana_kernels.system.huge_pages import use_huge_pages

BITS = 8
DRAFTED = (1, 2, 4)  # tokens before each check
PROMPTS, PROMPT = 4, 64  # prompts of each kind, and the tokens of one
console = Console(width=160)


def main(
    budget: Annotated[
        list[float] | None, typer.Option(help="Cost ratios of drafts; default 0.8, 0.7 and 0.56.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads; default 1 and all.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each text is continued by.")] = 64,
    calibration: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    output: Annotated[Path | None, typer.Option(help="CSV; default bench/results/drafts-….csv.")] = None,
) -> None:
    """Time drafts at several budgets, and write a table of them."""
    require_green_tests()
    stamp = conditions()
    folder = smollm2.fetch()
    console.print(f"{smollm2.NAME}, {BITS} bits, drafts from its own weights: {stamp}")
    baseline = dense(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), BITS, None)
    baseline.prepare()  # random weights of the same form: only its time counts
    model = compressed(folder, BITS, calibration)
    use_huge_pages(model)
    quicken(model)
    rana.set_budget(model, 1.0)
    drafts = {ratio: rana.make_draft(model, ratio) for ratio in budget or (0.8, 0.7, 0.56)}
    found: list[Row] = []
    for count in threads or thread_counts():
        for kind, prompts in _prompts(folder).items():
            for ratio, draft in drafts.items():
                with using(count):
                    timed = measure_drafts(model, draft, prompts, tokens, 2, DRAFTED, baseline.model)
                facts = {"model": smollm2.NAME, "threads": count, "text": kind, "draft_budget": ratio}
                found += [facts | row for row in timed]
                show(console, f"{kind}, {count} threads, drafts at {ratio}", found[-len(timed) :])
    path = output or RESULTS / f"drafts-{smollm2.NAME}-{processor()}.csv".lower()
    write_csv(path, stamp, found)
    console.print(f"wrote {path}")


def _prompts(folder: Path) -> dict[str, Tensor]:
    """Return prompts [PROMPTS, PROMPT] of each kind of text."""
    prose = smollm2.read_text(folder, "evaluation")
    code = AutoTokenizer.from_pretrained(folder)(inspect.getsource(textwrap)).input_ids
    spread = len(code) // PROMPTS
    starts = [code[i * spread : i * spread + PROMPT] for i in range(PROMPTS)]
    return {"English": prose[:PROMPTS, :PROMPT], "Python": torch.tensor(starts)}


if __name__ == "__main__":
    typer.run(main)
