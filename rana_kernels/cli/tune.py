"""`rana tune`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rana_kernels.cli.options import AsJson, Checkpoint, app, device, open_tokenizer, print_json
from rana_kernels.cli.tables import show_tuning
from rana_kernels.cli.tokens import find_files, read_token_ids
from rana_kernels.integrations.transformers import load
from rana_kernels.system.files import check_writable


@app.command(
    "tune",
    epilog="""\b
Example:
  rana tune llama-rana --text train.txt
From then on, every model with layers of these sizes uses the table.""",
)
def tune_kernels(
    directory: Checkpoint,
    text: Annotated[
        Path,
        typer.Option(
            help="Run the model on this text (UTF-8), or on a .safetensors file with input_ids [n, T]."
        ),
    ],
    tokens: Annotated[
        list[int],
        typer.Option(min=1, help="Tune for steps of this many tokens. Repeat the option for more sizes."),
    ] = [1, 2, 16, 64, 512],  # noqa: B006 - typer wants a list
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON file to write. Default: the file where the package looks for it."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest configurations of the Triton kernels on this GPU, for the layers of a model."""
    find_files(text)
    if output is not None:
        check_writable(output.parent)
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device, and this machine has none")
    from rana_kernels.backends.triton import configurations
    from rana_kernels.backends.triton.tune import tune, write

    model: Any = load(directory, device=device())
    length = max(tokens)
    token_ids = read_token_ids(
        text, open_tokenizer(directory), model.config.vocab_size, length=length, tokens=length
    )
    choices = tune(model, token_ids[:1].to(model.device), tokens)
    gpu_name = configurations.gpu_name(model.device)
    write(path := output or configurations.own_table(gpu_name), gpu_name, choices)
    if as_json:
        shown = {k: c._asdict() | {"configuration": asdict(c.configuration)} for k, c in choices.items()}
        print_json({"table": str(path), "choices": shown})
    else:
        show_tuning(choices, path)
