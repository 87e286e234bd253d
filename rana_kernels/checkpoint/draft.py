"""A draft: a second set of modules over the weights of a compressed model, with masks of a lower budget."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from rana_kernels.checkpoint.budget import set_budget
from rana_kernels.nn.base import AdapterModule

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def make_draft(model: Model, cost_ratio: float) -> Model:
    """Return a model with the weights of a compressed one, and masks of another budget.

    cost_ratio   as in `set_budget`

    It shares all tensors but the thresholds, so it takes no memory for weights, and other threads may run
    `model` meanwhile. With it, `model.generate(..., assistant_model=draft)` writes what `model` alone writes:
    the draft proposes tokens, and the model keeps those that it would have written (Leviathan et al., arXiv
    2211.17192). At a budget of 1.0, that is the text of the model without masks.

    Raises ValueError as `set_budget` does.
    """
    own = {
        id(module.threshold)
        for module in model.modules()
        if isinstance(module, AdapterModule) and module.has_threshold
    }
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
    draft = copy.deepcopy(model, shared)
    set_budget(draft, cost_ratio)
    return draft
