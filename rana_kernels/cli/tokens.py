"""Reading token ids from a file, for calibration and evaluation."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rana_kernels.cli.texts import KNOWN, read_pieces
from rana_kernels.system.progress import track

SAME = 0.5  # a text of which one token is a larger share says little about other texts


def find_files(*paths: Path | None) -> None:
    """Raise FileNotFoundError unless all files exist that are given, so that none is missed after hours."""
    for path in paths:
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file, {KNOWN}")


def read_token_ids(
    path: str | os.PathLike, tokenizer: Any, vocabulary: int, *, length: int, tokens: int | None = None
) -> Tensor:
    """Read token ids, int64 [n, T], from a text or from a safetensors file with `input_ids` [n, T].

    A text is read and tokenised in pieces, as far as its tokens are needed. A warning on stderr says if most
    tokens are the same one.

    tokenizer    a tokenizer of transformers; None if the model has none: the file must be a safetensors file
    vocabulary   size of the model's vocabulary; all ids must be less
    length       T for text, which is cut into sequences without overlap; a shorter rest is dropped.
                 A safetensors file has its own T
    tokens       read at most this many tokens, in whole sequences and at least one; None: all

    Raises FileNotFoundError, or ValueError for a file that is too short, damaged or not for this model.
    """
    place = Path(path)
    find_files(place)
    stored = place.suffix == ".safetensors"
    token_ids = _stored_token_ids(place) if stored else _split_text(place, tokenizer, length, tokens)
    if token_ids.min() < 0 or token_ids.max() >= vocabulary:
        raise ValueError(
            f"{place} has token ids {int(token_ids.min())} to {int(token_ids.max())}, wanted 0 to "
            f"{vocabulary - 1}, the model's vocabulary: was it made with another tokenizer?"
        )
    if tokens is not None:
        token_ids = token_ids[: _sequences(tokens, token_ids.shape[1])]
    _warn_of_one_token(place, token_ids, tokenizer)
    return token_ids


def _sequences(tokens: int, length: int) -> int:
    """Return how many whole sequences have at most so many tokens, at least one."""
    return max(1, tokens // length)


def _warn_of_one_token(path: Path, token_ids: Tensor, tokenizer: Any) -> None:
    # every sequence may begin with the same special token
    counts = token_ids[:, 1:].flatten().bincount()
    most, share = int(counts.argmax()), float(counts.max() / counts.sum())
    if share > SAME:
        name = f"token {most}" if tokenizer is None else repr(tokenizer.decode([most]))
        print(
            f"rana: warning: {share:.0%} of the tokens of {path} are the same, {name}: is it padding, or "
            "blank lines? Give text like the text that the model will read",
            file=sys.stderr,
        )


def _stored_token_ids(path: Path) -> Tensor:
    try:
        ids = load_file(path).get("input_ids")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if ids is None or ids.is_floating_point() or ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        has = "nothing" if ids is None else f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"{path}: input_ids has {has}, wanted integers [n, T] with n >= 1 and T >= 2")
    return ids.long()


def _split_text(path: Path, tokenizer: Any, length: int, tokens: int | None) -> Tensor:
    if tokenizer is None:
        raise ValueError(f"{path} is text and the model has no tokenizer: give a .safetensors of input_ids")
    # if the tokenizer begins every text with a special token, every sequence must begin with it
    first = [t for t in tokenizer("").input_ids[:1] if t == tokenizer.bos_token_id]
    own = length - len(first)
    ids = _tokenised(path, tokenizer, None if tokens is None else own * _sequences(tokens, length))
    count = len(ids) // own
    if count == 0:
        raise ValueError(
            f"{path} has {len(ids)} tokens, wanted at least one sequence of {own}: give more text"
        )
    beginning = torch.tensor(first, dtype=torch.int64).expand(count, len(first))
    return torch.cat([beginning, ids[: count * own].view(count, own)], dim=1)


def _tokenised(path: Path, tokenizer: Any, wanted: int | None) -> Tensor:
    """Return the ids of the pieces of a text, int64 [n]: of all, or of the first that have those wanted."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for piece in track(read_pieces(path), f"reading pieces of {path.name}", True):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        parts.append(torch.tensor(ids, dtype=torch.int64))
        if wanted is not None and sum(map(len, parts)) >= wanted:
            break
    return torch.cat(parts)
