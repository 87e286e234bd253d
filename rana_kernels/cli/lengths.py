"""Lengths of rows and continuations: defaults are lowered to what a model takes, given lengths are not."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.model.positions import positions_of, require_rows

ROW = 512  # tokens, by default
NEW = 100


def row_length(model: Any, asked: int | None) -> int:
    """Return the length of the rows that text is cut into: `asked`, or by default what the model takes.

    Raises ValueError if it is longer than the model's positions.
    """
    return _fitted(model, "--sequence-length", asked, ROW, 0)


def read_rows(model: Any, path: Path, tokenizer: Any, length: int, tokens: int | None = None) -> Tensor:
    """Do what `read_token_ids` does. Raise ValueError if the rows are longer than the model's positions."""
    token_ids = read_token_ids(path, tokenizer, model.config.vocab_size, length=length, tokens=tokens)
    require_rows(model, token_ids.shape[1], str(path))
    return token_ids


def count_new(model: Any, prompt: int, asked: int | None) -> int:
    """Return the number of new tokens after a prompt of so many: `asked`, or by default what the model takes.

    Raises ValueError if prompt and new tokens are longer than the model's positions.
    """
    limit = positions_of(model)
    if limit is not None and prompt >= limit:
        raise ValueError(
            f"the prompt has {prompt} tokens, wanted fewer than {limit}, the positions of "
            f"{type(model).__name__}: give a shorter one"
        )
    return _fitted(model, "--max-new-tokens", asked, NEW, prompt)


def _fitted(model: Any, option: str, asked: int | None, default: int, used: int) -> int:
    """Return the value of an option, which `used` other positions of the model leave room for."""
    limit = positions_of(model)
    wanted = default if asked is None else asked
    if limit is None or used + wanted <= limit:
        return wanted
    after = f" after a prompt of {used} tokens" if used else ""
    why = f"the {limit} positions of {type(model).__name__}{after}"
    if asked is not None:
        raise ValueError(f"{option} is {asked}, wanted at most {limit - used}: {why}")
    print(f"rana: {option} is {limit - used} instead of {default}: {why}", file=sys.stderr)
    return limit - used
