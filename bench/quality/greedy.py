"""TEAL's own shares (arXiv 2408.14690, algorithm 1): within a block, some linears can spare more inputs.

From a block without masks, the share of one linear is lowered step by step: that one whose step changes the
block's output least. A step saves the same cost in every linear. All blocks come to the same cost. The
thresholds of a share are those of one share for all linears: quantiles of the linear's own input.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality.subject import Subject, scoped, some_rows
from rana_kernels.model.architectures import Block

STEP = 0.05  # of the block's cost
TOKENS = 1024  # of the calibration text, on which outputs are compared

Shares = dict[str, float]


def shares_at(path: list[Shares], cost: dict[str, int], cost_ratio: float) -> Shares:
    """Return the shares of a block's linears at a cost, on the straight line between two steps."""
    total = sum(cost.values())
    for before, after in pairwise(path):
        high, low = (sum(shares[n] * cost[n] for n in cost) / total for shares in (before, after))
        if low <= cost_ratio <= high:
            part = (high - cost_ratio) / (high - low)
            return {n: before[n] + part * (after[n] - before[n]) for n in cost}
    raise ValueError(f"TEAL's steps end above a cost of {cost_ratio}")


class GreedyPath:
    """The steps of one block, found on a copy of its layer whose linears are masked.

    layer    the transformer layer, whose linears are `MaskedLinear`s
    masked   them by name
    inputs   x of each
    """

    def __init__(self, layer: nn.Module, masked: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        self.layer, self.masked, self.inputs = layer, masked, inputs
        self.cost = {name: module.linear.weight.numel() for name, module in masked.items()}

    def steps(self, arguments: list[tuple[tuple, dict]], until: float) -> list[Shares]:
        """Lower shares until the block costs less than `until`. Return the shares after each step."""
        shares = dict.fromkeys(self.masked, 1.0)
        self._set(shares)
        exact, path, total = self._outputs(arguments), [shares], sum(self.cost.values())
        while sum(shares[n] * self.cost[n] for n in shares) > until * total:
            tried = []
            for name in shares:
                lower = {**shares, name: shares[name] - STEP * total / self.cost[name]}
                if lower[name] > 0:
                    self._set(lower)
                    tried.append((float((self._outputs(arguments) - exact).square().sum()), lower))
            if not tried:
                break
            shares = min(tried, key=lambda entry: entry[0])[1]
            path.append(shares)
        return path

    def _set(self, shares: Shares) -> None:
        for name, module in self.masked.items():
            x = self.inputs[name]
            module.fit(x, shares[name] * x.shape[1])

    @torch.no_grad()
    def _outputs(self, arguments: list[tuple[tuple, dict]]) -> Tensor:
        found = [self.layer(*args, **kwargs) for args, kwargs in arguments]
        return torch.cat([y[0] if isinstance(y, tuple) else y for y in found])


def layer_name(block: Block) -> str:
    """Return the module that holds all linears of a block."""
    parts = [name.split(".") for name in scoped(block, "both")]
    same = [words[0] for words in zip(*parts, strict=False) if len(set(words)) == 1]
    return ".".join(same)


@torch.no_grad()
def arguments_of(subject: Subject) -> dict[str, list[tuple[tuple, dict]]]:
    """Return what each layer of the dense model is called with, by name, on some calibration rows."""
    found: dict[str, list[tuple[tuple, dict]]] = {}
    names = [layer_name(block) for block in subject.blocks]

    def recorder(name: str):
        return lambda _module, args, kwargs: found.setdefault(name, []).append((args, kwargs))

    hooks = [
        subject.dense.get_submodule(n).register_forward_pre_hook(recorder(n), with_kwargs=True) for n in names
    ]
    try:
        subject.dense(input_ids=some_rows(subject.calibration, TOKENS), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
