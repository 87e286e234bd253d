"""The output head (lm_head): the linear that turns the last hidden state into logits.

Planning and compression treat it as a block with one linear, so that it can have bits and masks of its own.
"""

from typing import Any

from torch import nn

from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import is_linear, kind_of

HEAD = -1  # the index of the head's block: statistics and unfinished work of the head have this number


def output_head(model: nn.Module) -> Any:
    """Return the module that makes logits (lm_head), or None."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    return find()


def head_names(model: nn.Module) -> list[str]:
    """Return the full name of lm_head, in a list that is empty if the model has none."""
    head = output_head(model)
    return [name for name, module in model.named_modules() if module is head]


def head_block(model: nn.Module) -> Block | None:
    """Return lm_head as a block of one linear, or None if the model has no lm_head that is a linear."""
    names = head_names(model)
    if not names or not is_linear(output_head(model)):
        return None
    return Block(HEAD, (), "", "", "", "", "", "", None, head=names[0])


def require_head(model: nn.Module) -> Block:
    """Return `head_block`. Raise ValueError if there is none."""
    block = head_block(model)
    if block is None:
        has = kind_of(output_head(model))
        raise ValueError(f"lm_head is a {has}, wanted torch.nn.Linear: give lm_head_bits=16")
    return block


def is_tied(model: nn.Module) -> bool:
    """Say whether transformers ties the weight of lm_head to the embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def untie_head(model: nn.Module) -> None:
    """Give lm_head a weight of its own in the eyes of transformers. The tensors stay as they are."""
    if is_tied(model):
        config: Any = model.config
        config.tie_word_embeddings = False
        tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
        for name in head_names(model):
            tied.pop(f"{name}.weight", None)
