"""`python -m bench.gpu.tune`: a table of Triton's configurations for the layers of a model's blocks."""

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.decode.models import SHAPES, random_model
from bench.decode.widths import set_thresholds, with_neurons
from bench.kernels.cases import QUANTIZED_COST_RATIO
from rana_kernels.backends import use_backend
from rana_kernels.backends.triton import configurations
from rana_kernels.backends.triton.tune import Choice, microseconds, tune, write

DEVICE = "cuda"
TOKENS = (1, 2, 4, 8, 16)
BITS = (16, 8, 4)


def main(
    output: Annotated[Path, typer.Argument(help="JSON, as `rana tune` writes it.")],
    model: Annotated[str, typer.Option(help=", ".join(SHAPES))],
) -> None:
    """Measure the candidates of `rana tune` on a block with random weights of 16, 8 and 4 bits.

    Its masks keep as much as those of the other benchmarks in 8 and 4 bits. To ship the table with the
    package, put it where `rana_kernels.backends.triton.configurations.shipped_table` looks for it.
    """
    config = copy.deepcopy(SHAPES[model])
    config.num_hidden_layers, config.vocab_size = 1, 256
    dense = random_model(config, torch.bfloat16, DEVICE)
    choices: dict[str, Choice] = {}
    for bits in BITS:
        made, _ = with_neurons(dense, bits)
        set_thresholds(made, QUANTIZED_COST_RATIO)
        ids = torch.randint(config.vocab_size, (1, max(TOKENS)), device=DEVICE)
        with use_backend("triton"):
            choices |= tune(made, ids, TOKENS, time=microseconds)
        write(output, configurations.gpu_name(made.device), choices)
    for key, choice in choices.items():
        print(f"{key}: {choice.microseconds:.1f} us, by the rule {choice.rule:.1f}")


if __name__ == "__main__":
    typer.run(main)
