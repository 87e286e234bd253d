"""Export a compressed model with its cache, and compile it with AOTInductor into one .pt2 file."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

import rana_kernels as rana


def export(model: PreTrainedModel, length: int) -> ExportedProgram:
    """Return the program `(input_ids [1, T], cache_position [T]) -> logits [1, T, vocabulary]`.

    The cache, for `length` tokens, is part of the program. A call writes its T tokens at `cache_position`
    (consecutive numbers) and sees all tokens before them. T is any number from 1 to `length`: a prompt is one
    call, and each further token one more. Position 0 starts a new text.
    """

    def place(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # OPT derives these from a mask as long as the cache's content, a size that export cannot know
        cache = named["cache" if "cache" in named else "past_key_values"]  # its name until transformers 5.24
        positions = cache.get_seq_length() + torch.arange(named["input_ids"].shape[1])
        return arguments, named | {"position_ids": positions[None], "attention_mask": torch.ones(1, length)}

    model.generation_config.cache_implementation = "static"
    program = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=length)
    tokens = Dim("tokens", min=1, max=length)
    with torch.no_grad(), model.register_forward_pre_hook(place, with_kwargs=True):
        return program.export(
            input_ids=torch.zeros(1, 3, dtype=torch.long),
            cache_position=torch.arange(3),
            dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
        )


def package(model: PreTrainedModel, length: int, output: Path) -> None:
    """Export, compile for this processor, and write `output`, a .pt2 file that stores its `length`."""
    partial = output.with_suffix(".partial.pt2")
    options = {"aot_inductor.metadata": {"length": str(length)}}
    program = export(model, length)
    torch._inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=options)
    partial.replace(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory that `rana compress` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--length", type=int, default=512, help="tokens that the cache holds (default 512)")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: that of the file)")
    arguments = parser.parse_args()
    package(rana.load(arguments.model, dtype=arguments.dtype), arguments.length, arguments.output)


if __name__ == "__main__":
    main()
