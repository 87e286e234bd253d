"""Continue a text with a .pt2 file from Python, without transformers. run.cpp does the same in C++."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import rana_kernels  # noqa: F401 - defines the ops that the file calls


def continuation(program: Callable[..., Tensor], prompt: list[int], count: int) -> list[int]:
    """Return the `count` tokens after `prompt`, each the likeliest."""
    written, unseen, seen = [], prompt, 0
    for _ in range(count):
        positions = torch.arange(seen, seen + len(unseen))
        logits = program(input_ids=torch.tensor([unseen]), cache_position=positions)
        seen += len(unseen)
        unseen = [int(logits[0, -1].argmax())]
        written += unseen
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a .pt2 file")
    parser.add_argument("prompt", type=Path, help="a text file of token ids")
    parser.add_argument("count", type=int, help="how many tokens to write")
    arguments = parser.parse_args()
    prompt = [int(token) for token in arguments.prompt.read_text().split()]
    program = torch._inductor.aoti_load_package(arguments.model)
    length = int(program.get_metadata()["length"])
    if len(prompt) + arguments.count > length:
        parser.error(f"prompt and count are {len(prompt) + arguments.count} tokens, the cache holds {length}")
    print(*continuation(program, prompt, arguments.count))


if __name__ == "__main__":
    main()
