"""How many ranks of LoRA each linear of a factored model gets, of one budget of trained weights.

All the same, or by an allocation of RankAdaptor's search (`search.py`): linears that read one input count as one.
"""

from torch import Tensor, nn

from rana_kernels.allocation.loss_model import InputShare
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.nn.factored import factored


def inputs_of(model: nn.Module) -> tuple[list[InputShare], dict[str, int]]:
    """Return the inputs of a factored model, and which of them each linear to train reads."""
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
    """Ranks of each linear: `rank` where the allocation is 0, and in all no more weights than that takes."""
    budget = sum(rank * _cost(model, name) for name in owner)
    low, high = 0.0, 2.0 * rank / float(allocation.exp().min())
    for _ in range(40):
        middle = (low + high) / 2
        spent = sum(_rank(middle, allocation, i) * _cost(model, name) for name, i in owner.items())
        low, high = (middle, high) if spent <= budget else (low, middle)
    return {name: _rank(low, allocation, i) for name, i in owner.items()}


def _rank(unit: float, allocation: Tensor, place: int) -> int:
    return max(1, int(unit * float(allocation[place].exp()) + 1e-6))


def _linears(model: nn.Module, block: Block, input_name: str) -> list[str]:
    """The plain linears of the adapters, or left dense, that read one input."""
    modules = dict(factored(model))
    names = []
    for linear in block.inputs[input_name]:
        if linear in modules:
            names += [f"{linear}.{part}" for part, _ in modules[linear].named_children()]
        elif _is_linear(model.get_submodule(linear)):
            names.append(linear)
    return names


def _is_linear(module: nn.Module) -> bool:
    """Of torch, or what GPT-2 has for it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _cost(model: nn.Module, name: str) -> int:
    """Trained weights of one rank."""
    return sum(model.get_parameter(f"{name}.weight").shape)
