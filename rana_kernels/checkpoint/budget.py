"""The budget of a compressed model, changed while the model is in use."""

import os

import torch
from torch import nn

from rana_kernels.checkpoint.attachment import attach_plan, attached_facts, attached_plan
from rana_kernels.model.admission import admit
from rana_kernels.model.dial import at_budget, set_masks

VARIABLE = "RANA_BUDGET"  # the cost ratio that checkpoints get when they are loaded


@torch.no_grad()
def set_budget(model: nn.Module, cost_ratio: float) -> float:
    """Set the masks of a compressed model to a budget, in place, and return the cost ratio that it has now.

    cost_ratio   the multiply-adds of the blocks' linears as a fraction of the dense ones: a mean over tokens,
                 expected on text like the calibration text. At 1.0 a plan without ranks is the dense model

    Weights stay as they are; only thresholds change. A compiled or captured model sees the new ones without
    a new graph. Another thread that runs the model meanwhile may see old masks in some layers and new ones
    in others. The plan in `model.config` changes too, so that saving keeps the budget.

    Raises ValueError for a model that is not compressed, one whose plan has no dial, or a cost ratio that
    the dial does not reach. The message says what it reaches.
    """
    model = admit(model, changes=False)
    plan = attached_plan(model)
    if plan is None:
        raise ValueError(
            f"set_budget: {type(model).__name__} is not compressed, wanted one that rana.compress changed or "
            "rana.load gave"
        )
    new = at_budget(plan, cost_ratio)
    set_masks(model, new)
    attach_plan(model, new, attached_facts(model))
    return 1 - new.reduction


def set_budget_of_environment(model: nn.Module) -> None:
    """Do what `set_budget` does with the cost ratio in RANA_BUDGET, if there is one.

    Raises ValueError for a value that is no number.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    try:
        cost_ratio = float(asked)
    except ValueError:
        raise ValueError(f"{VARIABLE} is {asked!r}, wanted a number such as 0.6") from None
    set_budget(model, cost_ratio)
