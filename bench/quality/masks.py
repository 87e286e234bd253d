"""The baselines that keep the weights as they are and skip inputs: TEAL, WINA and CATS, in plain PyTorch.

TEAL   (arXiv 2408.14690) zeroes inputs of every linear by |x_i|
WINA   (arXiv 2505.19427) by |x_i|·‖W_:,i‖₂
CATS   (arXiv 2404.08763) zeroes the gate's activations by size; up and down skip those neurons, the gate
       and attention stay dense

Thresholds are quantiles of a sample of the calibration text, with the same share for every linear. TEAL's
search for a share of each linear of a block, and WINA's top k of each token and its rotation of the
weights, are left out. Nothing here is fast: it is for measuring what these masks lose.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality.subject import Subject, scoped
from rana_kernels.evaluation.density import Costs
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.thresholds import threshold_for


class Masked(nn.Module):
    """Keeps the values whose `scores` reach the threshold."""

    threshold = 0.0

    def scores(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        return {"": self.scores(x) >= self.threshold}

    def fit(self, x: Tensor, live: float) -> None:
        """The threshold at which tokens like those of `x` keep `live` values on average."""
        self.threshold, _ = threshold_for(self.scores(x).flatten(0, -2), live)


class MaskedLinear(Masked):
    """A linear that sees no input i with |x_i|·norms_i below the threshold. norms [K] float32."""

    def __init__(self, linear: nn.Module, norms: Tensor) -> None:
        super().__init__()
        self.linear, self.norms = linear, norms

    def scores(self, x: Tensor) -> Tensor:
        return x.float().abs() * self.norms

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.where(self.masks(x)[""], x, 0))


class MaskedActivation(Masked):
    """An activation whose values below the threshold are zero."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def scores(self, x: Tensor) -> Tensor:
        return self.act(x).abs()

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.masks(x)[""], self.act(x), 0)


def mask_inputs(subject: Subject, scope: str, keep: float, *, weighted: bool) -> tuple[nn.Module, Costs]:
    """TEAL, or `weighted` WINA: a copy of the model whose linears in `scope` see `keep` of their inputs."""
    model, _ = subject.copy()
    rows, dense = {}, 0
    for block in subject.blocks:
        calibrated = CalibratedBlock(subject.dense, block, subject.stats)
        for name in scoped(block, scope):
            x, weight = calibrated.sample(calibrated.input_of((name,))), calibrated.linear(name).weight
            norms = calibrated.neuron_norms(name) if weighted else torch.ones(x.shape[1], device=x.device)
            masked = MaskedLinear(model.get_submodule(name), norms)
            masked.fit(x, keep * x.shape[1])
            model.set_submodule(name, masked)
            rows[name] = len(weight)
            dense += weight.numel()
    return model, Costs(dense, 0, rows)


def mask_gates(subject: Subject, scope: str, keep: float) -> tuple[nn.Module, Costs]:
    """CATS: a copy of the model that computes the neurons with large gates, at `keep` of the cost of `scope`.

    Raises ValueError for an MLP without a gate of its own, or a budget below what stays dense.
    """
    model, _ = subject.copy()
    cost = {name: subject.dense.get_submodule(name).weight.numel() for name in subject.linears(scope)}
    skipped = sum(cost.get(name, 0) for block in subject.blocks for name in (block.up, block.down))
    dense = sum(cost.values())
    share = (keep * dense - (dense - skipped)) / skipped if skipped else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"CATS leaves {1 - skipped / dense:.2f} of the cost dense, wanted {keep}")
    rows = {}
    for block in subject.blocks:
        if not block.act or block.gate in ("", block.up):
            raise ValueError("CATS needs an MLP with a gate of its own")
        calibrated = CalibratedBlock(subject.dense, block, subject.stats)
        gates = calibrated.dense(block.gate, calibrated.sample("mlp"))
        masked = MaskedActivation(model.get_submodule(block.act))
        masked.fit(gates, share * gates.shape[1])
        model.set_submodule(block.act, masked)
        rows[block.act] = (cost[block.up] + cost[block.down]) // gates.shape[1]
    return model, Costs(dense, dense - skipped, rows)


@torch.no_grad()
def refit(model: Any, rows: Tensor, live: dict[str, float]) -> None:
    """New thresholds for weights that have changed: on `rows` [n, T], each mask keeps what `live` says.

    One pass: a mask is fitted before it is used, on what the fitted ones before it give.
    """

    def fit(name: str, module: Masked, args: tuple[Tensor, ...]) -> None:
        module.fit(args[0], live[name])

    masked = {name: module for name, module in model.named_modules() if isinstance(module, Masked)}
    hooks = [module.register_forward_pre_hook(partial(fit, name)) for name, module in masked.items()]
    try:
        model(input_ids=rows.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
