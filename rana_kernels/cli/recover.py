"""`rana recover`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rana_kernels.allocation.search import Search, own_history
from rana_kernels.checkpoint.model_card import note
from rana_kernels.cli.lengths import read_rows, row_length
from rana_kernels.cli.options import (
    AsJson,
    Checkpoint,
    Dtype,
    SearchHistory,
    SequenceLength,
    app,
    check_output,
    dtype_name,
    hold_out,
    open_compressed,
    open_model,
    open_tokenizer,
    print_json,
    unfinished_work,
)
from rana_kernels.cli.tokens import find_files
from rana_kernels.evaluation import metrics
from rana_kernels.integrations.transformers import save
from rana_kernels.recovery.training import Training


@app.command(
    "recover",
    epilog="""\b
Example:
  rana recover llama-rana --text train.txt --dense meta-llama/Llama-3.2-1B -o llama-recovered
After an interruption, the same command continues after the last saved step.""",
)
def recover_model(
    directory: Checkpoint,
    text: Annotated[
        Path,
        typer.Option(help="Train on this text (UTF-8), or on a .safetensors file with input_ids [n, T]."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write the recovered model to.")
    ],
    dense: Annotated[
        str | None,
        typer.Option(
            help="The dense model: a directory, GGUF file or hub name. Training then learns its predictions "
            "instead of the tokens of the text."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Train for this many steps of the optimizer.")] = 300,
    batch: Annotated[
        int, typer.Option(min=1, help="Compute this many sequences at a time. Fewer need less memory.")
    ] = 4,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Add up the gradients of this many batches for each step.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate of the schedule.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Train a LoRA of this rank on each linear.")] = 16,
    evaluations: Annotated[
        int,
        typer.Option(
            min=0,
            help="Measure this many divisions of the LoRA ranks among the linears, and use the best. With 0, "
            "all linears get the same rank.",
        ),
    ] = 0,
    search_steps: Annotated[
        int, typer.Option(min=1, help="Train for this many steps to measure one division of the ranks.")
    ] = 20,
    history: SearchHistory = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Measure perplexity on this text. Default: on every eighth sequence of --text, which is "
            "held out of the training."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many tokens of the text. Default: all.")
    ] = None,
    sequence_length: SequenceLength = None,
    seed: Annotated[int, typer.Option(help="Seed for the LoRA, the order of batches and the search.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Recover quality: train low-rank updates briefly, and merge them into the compressed model.

    Its sizes and cost do not change. A few hundred steps are enough, on text like the training text of the
    dense model.
    """
    if find_spec("peft") is None:
        raise ImportError("rana recover needs PEFT: pip install rana_kernels[peft]")
    from rana_kernels.recovery.run import Lora, recover

    _check_output(directory, output)
    find_files(text, evaluation)
    model = open_compressed(directory)
    tokenizer, length = open_tokenizer(directory), row_length(model, sequence_length)
    token_ids, held_out = hold_out(read_rows(model, text, tokenizer, length, tokens))
    evaluated = held_out if evaluation is None else read_rows(model, evaluation, tokenizer, length)
    teacher = None if dense is None else open_model(dense, Dtype(dtype_name(model)))
    training = Training(steps, batch, accumulate, learning_rate, seed)
    search = Search(held_out, evaluations, seed, history or own_history()) if evaluations else None
    before = metrics.perplexity(model, evaluated).perplexity
    trained_tokens = steps * batch * accumulate * token_ids.shape[1]
    facts = {"steps": steps, "tokens": trained_tokens, "rank": rank, "seed": seed}
    recovery = {**facts, "data": text.name, "dense": dense}
    with unfinished_work(output) as resume_dir:
        recover(
            model, token_ids, training, Lora(rank, search_steps),
            dense=teacher, search=search, resume_dir=resume_dir,
        )  # fmt: skip
        after = metrics.perplexity(model, evaluated).perplexity
        data = f"sequences held out of {text.name}" if evaluation is None else evaluation.name
        found = {"compressed": after, "unrecovered": before, "data": data}
        # the dense perplexity in the model card, if any, may have been measured on other text
        note(model, recovery=recovery, perplexity={**found, "dense": None})
        save(model, output, tokenizer)
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
    check_output(output)
