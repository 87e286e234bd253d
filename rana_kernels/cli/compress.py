"""`rana compress`."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.latency_measurement import measure_latency
from rana_kernels.allocation.methods import DEFAULT, METHODS, make_request, needs
from rana_kernels.allocation.request import formats
from rana_kernels.allocation.search import Search, own_history
from rana_kernels.checkpoint.manifest import read_manifest
from rana_kernels.checkpoint.model_card import note
from rana_kernels.cli.forecast import forecast
from rana_kernels.cli.lengths import read_rows, row_length
from rana_kernels.cli.options import (
    AsJson,
    Bits,
    Dtype,
    Group,
    SearchHistory,
    SequenceLength,
    app,
    check_output,
    hold_out,
    open_model,
    open_tokenizer,
    print_json,
    refuse_compressed,
    unfinished_work,
)
from rana_kernels.cli.tables import show_compression
from rana_kernels.cli.tokens import find_files
from rana_kernels.compression.report import CompressReport
from rana_kernels.compression.run import compress as compress_model
from rana_kernels.evaluation import metrics
from rana_kernels.integrations.transformers import save
from rana_kernels.model.architectures import find_blocks
from rana_kernels.rotation import run as rotation
from rana_kernels.statistics.calibration import calibrate
from rana_kernels.statistics.thresholds import evenly
from rana_kernels.system.files import check_writable

FLOPS_REDUCTION = 0.44

Method = Enum("Method", {name: name for name in METHODS}, type=str)  # type: ignore[misc]


@app.command(
    epilog="""\b
Examples:
  rana compress meta-llama/Llama-3.2-1B --calibration text.txt -o llama-rana
  rana compress ./model --calibration tokens.safetensors --flops-reduction 0.3 -o out --json
  rana compress ./model --calibration text.txt --flops-reduction 0.2 --bits 4 -o out
  rana compress ./model --calibration text.txt --bytes-reduction 0.7 --bits auto -o out
  rana compress ./model --calibration text.txt --flops-reduction 0.3 --rotate -o out
  rana compress ./model.Q8_0.gguf --calibration text.txt --bits 4 -o out
  rana compress ./model --calibration text.txt --method rankadaptor --evaluations 50 -o out
  rana compress ./model --calibration text.txt --time-reduction 0.3 --times here.json -o out
After an interruption, the same command continues after the last finished block or evaluation."""
)
def compress(
    model: Annotated[
        str,
        typer.Argument(
            help="The model: a directory, a GGUF file, or its name on the Hugging Face hub. The weights of a "
            "GGUF file become floats first."
        ),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Calibrate on this text (UTF-8; of .jsonl, .json, .csv and .tsv the fields `text`), or on a "
            ".safetensors file with input_ids [n, T]. It should be like the text that the model will read."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write the compressed model to.")
    ],
    flops_reduction: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Save this fraction of the FLOPs of the linears in the blocks.",
            show_default=str(FLOPS_REDUCTION),
        ),
    ] = None,
    time_reduction: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Save this fraction of the time that these linears take for one token, instead of FLOPs. "
            "Needs --times.",
        ),
    ] = None,
    bytes_reduction: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Save this fraction of the bytes that a token reads in these linears and lm_head, instead "
            "of FLOPs. 8 bits alone save 0.47 of those in 16, 4 bits 0.72; masks save the rest. lm_head may "
            "get a mask, too.",
        ),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the times of the kernels. If it does not exist, they are measured and "
            "written to it."
        ),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(min=0.0, help="Let these linears store at most this many MB (millions of bytes)."),
    ] = None,
    bits: Annotated[
        Bits,
        typer.Option(
            help="Store the weights in this many bits. 16: in the dtype of the model, unrounded. auto: with "
            "--bytes-reduction, every linear gets the bits that lose least, together with its mask."
        ),
    ] = Bits.sixteen,
    group: Annotated[
        Group,
        typer.Option(help="In 8 and 4 bits, this many columns of a weight share a scale. row: a whole row."),
    ] = Group.thirty_two,
    lm_head_bits: Annotated[
        Bits | None,
        typer.Option(
            "--lm-head-bits", help="Store the weight of lm_head in this many bits. Default: as --bits."
        ),
    ] = None,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="First rotate the value heads and the residual stream, so that masks lose less. Predictions "
            "stay the same. Takes minutes, and a tied lm_head gets a weight of its own. For 16 and 8 bits: "
            "in 4 bits it lost more than it gained where it was measured.",
        ),
    ] = False,
    method: Annotated[
        Method,
        typer.Option(
            help="How the budget is spent. "
            + "; ".join(f"{name}: {each.summary}" for name, each in METHODS.items())
            + ".",
        ),
    ] = Method[DEFAULT],
    evaluations: Annotated[
        int,
        typer.Option(
            min=1,
            help="With rankadaptor, measure this many allocations. The first is the one of method global.",
        ),
    ] = 30,
    history: SearchHistory = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Calibrate on at most this many tokens. 100,000 are plenty.")
    ] = 131_072,
    sequence_length: SequenceLength = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Load and store the weights in this dtype. auto: the dtype of the files.")
    ] = Dtype.auto,
    seed: Annotated[
        int, typer.Option(help="Seed for the choice of the calibration tokens that set the thresholds.")
    ] = 0,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Measure perplexity before and after on this text, and note it in the model card. Give "
            "other text than the calibration."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the linears of a model by adapters that skip work, and write the compressed model."""
    check_output(output)
    if times is not None and not times.exists():
        check_writable(times.parent)
    refuse_compressed(model)
    find_files(calibration, evaluation)
    original, tokenizer = open_model(model, dtype), open_tokenizer(model)
    length = row_length(original, sequence_length)
    token_ids = read_rows(original, calibration, tokenizer, length, tokens)
    evaluated = None if evaluation is None else read_rows(original, evaluation, tokenizer, length)
    nothing_asked = all(asked is None for asked in (flops_reduction, time_reduction, bytes_reduction))
    flops = FLOPS_REDUCTION if nothing_asked else flops_reduction
    latency = _latency(times, original)
    search = None
    if METHODS[method.value].searches:
        token_ids, held_out = hold_out(token_ids)
        search = Search(held_out, evaluations, seed, history or own_history())
    asked: dict[str, Any] = {
        "flops_reduction": flops, "time_reduction": time_reduction, "bytes_reduction": bytes_reduction,
        "times": latency, "max_memory": None if max_memory is None else round(max_memory * 1e6),
        "search": search,
    }  # fmt: skip
    widths = (bits.number, group.columns, lm_head_bits.number if lm_head_bits else None)
    own, of_head = formats(original, *widths)
    request = make_request(method.value, **asked, formats=own, lm_head_formats=of_head)
    blocks, wanted = find_blocks(original), needs(request, original)
    METHODS[method.value].check(original, blocks, request)
    print(forecast(original, blocks, token_ids, wanted, search), file=sys.stderr)
    if evaluated is not None:
        dense = metrics.perplexity(original, evaluated).perplexity
    if rotate:
        some = token_ids[evenly(token_ids.numel(), rotation.TOKENS)]
        rotation.rotate(original, some.split(4), seed=seed)
    stats = calibrate(original, token_ids.split(4), seed=seed, **wanted)
    with unfinished_work(output) as resume_dir:
        report = compress_model(
            original,
            stats=stats,
            **asked,
            bits=widths[0],
            group=widths[1],
            lm_head_bits=widths[2],
            method=method.value,
            resume_dir=resume_dir,
        )
        note(original, base_model=model, calibration={"data": calibration.name})
        if evaluated is not None and evaluation is not None:
            found = metrics.perplexity(original, evaluated).perplexity
            note(original, perplexity={"compressed": found, "dense": dense, "data": evaluation.name})
        save(original, output, tokenizer)
    _show(report, output, stats.tokens, search, as_json)


def _show(report: CompressReport, output: Path, tokens: int, search: Search | None, as_json: bool) -> None:
    """Print the result, as tables or as JSON."""
    stored = read_manifest(output).facts["stored_bytes"]
    if as_json:
        facts: dict[str, Any] = {"directory": str(output), "tokens": tokens, "stored_bytes": stored}
        if search:
            facts["search"] = {"losses": search.losses, "dense": search.baseline_loss}
        print_json({**facts, **json.loads(report.to_json())})
    else:
        show_compression(report, output, stored)
        if search:
            print(search.summary("of global", "of the dense model"))


def _latency(path: Path | None, model: nn.Module) -> LatencyTable | None:
    """Read the times of kernels from `path`. If there is no such file, measure them and write it."""
    if path is None or path.exists():
        return None if path is None else LatencyTable.load(path)
    table = measure_latency(model)
    table.save(path)
    return table
