"""Checks of the token ids that are given to a model: their number and their range."""

from typing import Any

import torch
from torch import Tensor, nn


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens of one text the model takes by its config, or None if that says nothing.

    Rotary positions that are scaled (YaRN) reach further than `max_position_embeddings` in some configs.
    """
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [
        part for part in scaling.values() if isinstance(part, dict)
    ]  # Gemma 3: by the type of a layer
    return max(round(limit * (part.get("factor") or 1)) for part in (scaling, *by_layer))


def require_rows(model: nn.Module, length: int, what: str) -> None:
    """Raise ValueError if rows of `length` tokens are longer than the model has positions.

    what   that which has these rows, the subject of the message
    """
    limit = positions_of(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"{what} has rows of {length} tokens, wanted at most {limit}, the positions of "
            f"{type(model).__name__}: cut them into shorter rows"
        )


def require_ids(model: nn.Module, input_ids: Tensor, what: str) -> None:
    """Raise ValueError if a token id has no embedding. `what` is the subject of the message."""
    known = vocabulary_of(model)
    if known is None or not input_ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= known:
        raise ValueError(
            f"{what} has token {low if low < 0 else high}, wanted 0 to {known - 1}, the vocabulary of "
            f"{type(model).__name__}: tokenise the text with the tokenizer of this model"
        )


def vocabulary_of(model: nn.Module) -> int | None:
    """Return the number of embeddings of the model, or None for a model of somebody's own."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return getattr(find(), "num_embeddings", None)
    except NotImplementedError:
        return None
