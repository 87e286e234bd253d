"""From a file to rows of tokens, for calibration and evaluation."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_token_ids(
    path: str | os.PathLike, tokenizer: Any, vocabulary: int, *, length: int, tokens: int | None = None
) -> Tensor:
    """Rows of token ids, int64 [n, T], from a text or from a safetensors file with `input_ids` [n, T].

    tokenizer    of transformers; None where the file must hold tokens already
    vocabulary   the model's: ids must be below it
    length       T for text, which is cut into rows without overlap; the shorter rest is dropped.
                 A safetensors file has its own T
    tokens       read at most the first so many, in whole rows and at least one; None: all

    Raises FileNotFoundError, or ValueError for a file that is too short, damaged or not of this model.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(
            f"{place}: there is no such file, wanted a text or a .safetensors of input_ids"
        )
    rows = (
        _stored_token_ids(place) if place.suffix == ".safetensors" else _split_text(place, tokenizer, length)
    )
    if rows.min() < 0 or rows.max() >= vocabulary:
        raise ValueError(
            f"{place} has token ids {int(rows.min())} to {int(rows.max())}, wanted 0 to {vocabulary - 1}, "
            "the model's vocabulary: was it made with another tokenizer?"
        )
    return rows if tokens is None else rows[: max(1, tokens // rows.shape[1])]


def _stored_token_ids(path: Path) -> Tensor:
    try:
        ids = load_file(path).get("input_ids")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if ids is None or ids.is_floating_point() or ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        has = "nothing" if ids is None else f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"{path}: input_ids has {has}, wanted integers [n, T] with n >= 1 and T >= 2")
    return ids.long()


def _split_text(path: Path, tokenizer: Any, length: int) -> Tensor:
    if tokenizer is None:
        raise ValueError(f"{path} is text and the model has no tokenizer: give a .safetensors of input_ids")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    # a model whose tokenizer begins every text with a token of its own wants that in every row
    first = [t for t in tokenizer("").input_ids[:1] if t == tokenizer.bos_token_id]
    own = length - len(first)
    count = len(ids) // own
    if count == 0:
        raise ValueError(f"{path} has {len(ids)} tokens, wanted at least one row of {own}: give more text")
    beginning = torch.tensor(first, dtype=torch.int64).expand(count, len(first))
    return torch.cat([beginning, ids[: count * own].view(count, own)], dim=1)
