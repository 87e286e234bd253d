"""`rana compress`."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from torch import nn

from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.latency_measurement import measure_latency
from rana_kernels.allocation.methods import DEFAULT, METHODS
from rana_kernels.allocation.search import Search, own_history
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.manifest import read_manifest
from rana_kernels.checkpoint.model_card import note
from rana_kernels.checkpoint.replacement import check_target
from rana_kernels.cli.options import (
    AsJson,
    Dtype,
    RowLength,
    SearchHistory,
    app,
    hold_out,
    open_model,
    open_tokenizer,
    print_json,
)
from rana_kernels.cli.tables import show_compression
from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.compression.run import compress as compress_model
from rana_kernels.evaluation import metrics
from rana_kernels.integrations.transformers import save
from rana_kernels.statistics.calibration import calibrate

FLOPS_REDUCTION = 0.44


@app.command(
    epilog="""\b
Examples:
  rana compress meta-llama/Llama-3.2-1B --calibration text.txt -o llama-rana
  rana compress ./model --calibration tokens.safetensors --flops-reduction 0.3 -o out --json
  rana compress ./model --calibration text.txt --method rankadaptor --evaluations 50 -o out
  rana compress ./model --calibration text.txt --time-reduction 0.3 --times here.json -o out
After an interruption, the same command goes on from the last finished block or evaluation."""
)
def compress(
    model: Annotated[str, typer.Argument(help="A model's directory, or its name on the Hugging Face hub.")],
    calibration: Annotated[
        Path,
        typer.Option(help="Text (UTF-8), or a .safetensors with input_ids [n, T]: what the model reads."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    flops_reduction: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Share of the blocks' linear FLOPs to save.", show_default="0.44"
        ),
    ] = None,
    time_reduction: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="In its place: share of their time for one token, by --times."),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(help="Times of kernels, measured here and written if there is no such file."),
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(min=0.0, help="Most MB (millions of bytes) that these linears may store.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            click_type=click.Choice(list(METHODS)),
            help="; ".join(f"{name}: {each.summary}" for name, each in METHODS.items()) + ".",
        ),
    ] = DEFAULT,
    evaluations: Annotated[
        int,
        typer.Option(min=1, help="With rankadaptor: how many allocations to measure, global's the first."),
    ] = 30,
    history: SearchHistory = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibrate on at most so many tokens.")] = 131_072,
    sequence_length: RowLength = 512,
    dtype: Annotated[Dtype, typer.Option(help="Load and store the weights as.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Which calibration tokens thresholds are chosen on.")] = 0,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Other text of that kind: perplexity on it, before and after, goes on the card."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace a model's linear layers by adapters that skip work, and write the result.

    A good calibration text is like what the model will read; 100,000 tokens of it are plenty.
    """
    check_target(output)
    original, tokenizer = open_model(model, dtype), open_tokenizer(model)
    if attached_plan(original) is not None:
        raise ValueError(f"{model} is compressed already, wanted the original model")
    token_ids = read_token_ids(
        calibration, tokenizer, original.config.vocab_size, length=sequence_length, tokens=tokens
    )
    progress = sys.stderr.isatty()
    held_out = None
    if evaluation is not None:
        held_out = read_token_ids(evaluation, tokenizer, original.config.vocab_size, length=sequence_length)
        dense = metrics.perplexity(original, held_out, progress=progress).perplexity
    flops = FLOPS_REDUCTION if flops_reduction is None and time_reduction is None else flops_reduction
    table = _table(times, original, progress)
    cap = None if max_memory is None else round(max_memory * 1e6)
    search = None
    if METHODS[method].searches:
        token_ids, measured_on = hold_out(token_ids)
        search = Search(measured_on, evaluations, seed, history or own_history())
    stats = calibrate(original, token_ids.split(4), seed=seed, progress=progress, **METHODS[method].needs)
    unfinished = output.resolve().with_name(f"{output.resolve().name}.resume")
    try:
        report = compress_model(
            original,
            stats=stats,
            flops_reduction=flops,
            time_reduction=time_reduction,
            times=table,
            max_memory=cap,
            method=method,
            search=search,
            resume_dir=unfinished,
            progress=progress,
        )
    except KeyboardInterrupt:
        print("rana: interrupted. The same command goes on where this one stopped", file=sys.stderr)
        raise
    note(original, base_model=model, calibration={"data": calibration.name})
    if held_out is not None and evaluation is not None:
        found = metrics.perplexity(original, held_out, progress=progress).perplexity
        note(original, perplexity={"compressed": found, "dense": dense, "data": evaluation.name})
    save(original, output, tokenizer)
    shutil.rmtree(unfinished)
    stored = read_manifest(output).facts["stored_bytes"]
    if as_json:
        facts: dict[str, Any] = {"directory": str(output), "tokens": stats.tokens, "stored_bytes": stored}
        if search:
            facts["search"] = {"losses": search.losses, "dense": search.baseline_loss}
        print_json({**facts, **json.loads(report.to_json())})
    else:
        show_compression(report, output, stored)
        if search:
            print(search.summary("of global", "of the dense model"))


def _table(path: Path | None, model: nn.Module, progress: bool) -> LatencyTable | None:
    """Read, or measured and written."""
    if path is None or path.exists():
        return None if path is None else LatencyTable.load(path)
    table = measure_latency(model, progress)
    table.save(path)
    return table
