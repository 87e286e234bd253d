"""`rana eval`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rana_kernels import evaluate
from rana_kernels.checkpoint import attached_plan
from rana_kernels.cli.options import (
    AsJson,
    Checkpoint,
    Dtype,
    RowLength,
    app,
    device,
    dtype_name,
    open_model,
    open_tokenizer,
    print_json,
)
from rana_kernels.integrations.transformers import load
from rana_kernels.tables import show_evaluation
from rana_kernels.tokens import read_rows

LIVE_TOKENS = 4096  # on which kept rows are counted: a mean over so many is steady


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
        Path, typer.Option(help="Text (UTF-8), or a .safetensors with input_ids [n, T]; not the calibration.")
    ],
    against: Annotated[str | None, typer.Option(help="The dense model, to compare with.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Use at most so many tokens.")] = None,
    sequence_length: RowLength = 512,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, tokens a second and the rows that the masks keep."""
    model: Any = load(directory, device=device())
    rows = read_rows(
        text, open_tokenizer(directory), model.config.vocab_size, length=sequence_length, tokens=tokens
    )
    dense = None if against is None else _measure(open_model(against, Dtype(dtype_name(model))), rows)
    found = _measure(model, rows)
    some = rows[: max(1, LIVE_TOKENS // rows.shape[1])]
    kept = evaluate.kept_rows(model, some, progress=sys.stderr.isatty())
    plan = attached_plan(model)
    assert plan is not None, "load gives models with a plan"
    live = {name: count.mean for name, count in kept.items()}
    if as_json:
        adapters = [
            {"names": a.names, "kind": a.kind, "rank": a.rank, "planned": a.live, "kept": live[a.names[0]]}
            for a in plan.adapters
            if a.kind != "dense"
        ]
        print_json({"model": found, "dense": dense, "adapters": adapters})
    else:
        show_evaluation(found, dense, plan, live)


def _measure(model: Any, rows: torch.Tensor) -> dict[str, float]:
    found = evaluate.perplexity(model, rows, progress=sys.stderr.isatty())
    half = max(1, min(64, rows.shape[1] // 2))
    return {**asdict(found), "decode_tokens_per_second": evaluate.decode_speed(model, rows[:1, :half], half)}
