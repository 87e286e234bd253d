"""`rana recover`."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from rana_kernels.allocation.search import Search, own_history
from rana_kernels.checkpoint.model_card import note
from rana_kernels.checkpoint.replacement import check_target
from rana_kernels.cli.options import (
    AsJson,
    Checkpoint,
    Dtype,
    RowLength,
    SearchHistory,
    app,
    device,
    dtype_name,
    hold_out,
    open_model,
    open_tokenizer,
    print_json,
)
from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.evaluation import metrics
from rana_kernels.integrations.transformers import load, save
from rana_kernels.recovery.training import Training


@app.command(
    "recover",
    epilog="""\b
Example:
  rana recover llama-rana --text train.txt --dense meta-llama/Llama-3.2-1B -o llama-recovered
After an interruption, the same command goes on from the last saved step.""",
)
def recover_model(
    directory: Checkpoint,
    text: Annotated[
        Path, typer.Option(help="Text (UTF-8), or a .safetensors with input_ids [n, T], to train on.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    dense: Annotated[
        str | None, typer.Option(help="The dense model: learn its predictions instead of the text's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Rows in memory at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA on each linear.")] = 16,
    evaluations: Annotated[
        int, typer.Option(min=0, help="Share the ranks out by measuring so many allocations of them.")
    ] = 0,
    search_steps: Annotated[int, typer.Option(min=1, help="Steps of the training for each of these.")] = 20,
    history: SearchHistory = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Measure perplexity on this text; default: on every eighth row, left out."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Use at most so many tokens of the text.")] = None,
    sequence_length: RowLength = 512,
    seed: Annotated[int, typer.Option(help="Of the LoRA, the batches and the search.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Win back quality by a short training of low-rank updates, merged into the compressed model.

    Sizes and cost stay what they are. A few hundred steps on text like that of the dense model's training.
    """
    if find_spec("peft") is None:
        raise ImportError("rana recover needs PEFT: pip install rana_kernels[peft]")
    from rana_kernels.recovery.run import Lora, recover

    _check_output(directory, output)
    model: Any = load(directory, device=device())
    vocabulary, tokenizer = model.config.vocab_size, open_tokenizer(directory)
    read = read_token_ids(text, tokenizer, vocabulary, length=sequence_length, tokens=tokens)
    token_ids, held_out = hold_out(read)
    measured_on = held_out
    if evaluation is not None:
        measured_on = read_token_ids(evaluation, tokenizer, vocabulary, length=sequence_length)
    teacher = None if dense is None else open_model(dense, Dtype(dtype_name(model)))
    progress = sys.stderr.isatty()
    training = Training(steps, batch, accumulate, learning_rate, seed)
    search = Search(held_out, evaluations, seed, history or own_history()) if evaluations else None
    before = metrics.perplexity(model, measured_on, progress=progress).perplexity
    unfinished = output.resolve().with_name(f"{output.resolve().name}.resume")
    try:
        recover(
            model, token_ids, training, Lora(rank, search_steps),
            dense=teacher, search=search, resume_dir=unfinished, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("rana: interrupted. The same command goes on where this one stopped", file=sys.stderr)
        raise
    after = metrics.perplexity(model, measured_on, progress=progress).perplexity
    facts = {
        "steps": steps,
        "tokens": steps * batch * accumulate * token_ids.shape[1],
        "rank": rank,
        "seed": seed,
    }
    recovery = {**facts, "data": text.name, "dense": dense}
    measured = f"rows left out of {text.name}" if evaluation is None else evaluation.name
    found = {"compressed": after, "unrecovered": before, "data": measured}
    # what was noted of the dense model was perhaps measured on something else
    note(model, recovery=recovery, perplexity={**found, "dense": None})
    save(model, output, tokenizer)
    shutil.rmtree(unfinished)
    if as_json:
        searched = {"losses": search.losses, "before": search.baseline_loss} if search else None
        print_json({"directory": str(output), **recovery, "perplexity": found, "search": searched})
        return
    print(f"perplexity {before:.4f} became {after:.4f}; written to {output}")
    if search:
        print(search.summary("with equal ranks", "before any training"))


def _check_output(directory: Path, output: Path) -> None:
    if output.resolve() == directory.resolve():
        raise ValueError(f"{output} is the model to recover, wanted another directory to write")
    check_target(output)
