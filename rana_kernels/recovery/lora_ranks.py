"""The LoRA rank of each linear of a factored model, within one budget of trained weights.

All linears get the same rank, or an allocation of RankAdaptor's search (`allocation/search.py`) decides. An
allocation has one number for all linears that read the same input.
"""

from torch import Tensor, nn

from rana_kernels.allocation.loss_model import InputShare
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.nn.factored import factored


def inputs_of(model: nn.Module) -> tuple[list[InputShare], dict[str, int]]:
    """Return the inputs of a factored model, and for each trained linear the index of its input."""
    blocks = find_blocks(model)
    places = [(block, name) for block in blocks for name in block.inputs]
    owner = {name: i for i, place in enumerate(places) for name in _linears(model, *place)}
    cost = [0.0] * len(places)
    for name, i in owner.items():
        cost[i] += _cost(model, name)
    depth = {block.index: i / max(1, len(blocks) - 1) for i, block in enumerate(blocks)}
    found = [
        InputShare(name, depth[block.index], part / sum(cost))
        for (block, name), part in zip(places, cost, strict=True)
    ]
    return found, owner


def ranks(model: nn.Module, owner: dict[str, int], allocation: Tensor, rank: int) -> dict[str, int]:
    """Return the rank of each linear. The total of trained weights is at most that of `rank` everywhere."""
    budget = sum(rank * _cost(model, name) for name in owner)
    low, high = 0.0, 2.0 * rank / float(allocation.exp().min())
    for _ in range(40):
        middle = (low + high) / 2
        spent = sum(_rank(middle, allocation, i) * _cost(model, name) for name, i in owner.items())
        low, high = (middle, high) if spent <= budget else (low, middle)
    return {name: _rank(low, allocation, i) for name, i in owner.items()}


def _rank(unit: float, allocation: Tensor, index: int) -> int:
    return max(1, int(unit * float(allocation[index].exp()) + 1e-6))


def _linears(model: nn.Module, block: Block, input_name: str) -> list[str]:
    """Return the plain linears that read one input: parts of factored adapters, and dense linears."""
    modules = dict(factored(model))
    names = []
    for linear in block.inputs[input_name]:
        if linear in modules:
            names += [f"{linear}.{part}" for part, _ in modules[linear].named_children()]
        elif _is_linear(model.get_submodule(linear)):
            names.append(linear)
    return names


def _is_linear(module: nn.Module) -> bool:
    """Say whether it is a linear of torch or the Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _cost(model: nn.Module, name: str) -> int:
    """Return the number of trained weights of one rank."""
    return sum(model.get_parameter(f"{name}.weight").shape)
