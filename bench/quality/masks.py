"""The baselines that keep the weights as they are and skip inputs: TEAL, WINA and CATS, in plain PyTorch.

TEAL   (arXiv 2408.14690) zeroes inputs of every linear by |x_i|
WINA   (arXiv 2505.19427) by |x_i|·‖W_:,i‖₂
CATS   (arXiv 2404.08763) zeroes the gate's activations by size; up and down skip those neurons, the gate
       and attention stay dense

Thresholds are quantiles of a sample of the calibration text, with the same share for every linear. TEAL's
search for a share of each linear of a block, and WINA's top k of each token and its rotation of the
weights, are left out. Nothing here is fast: it is for measuring what these masks lose.
"""

import torch
from torch import Tensor, nn

from bench.quality.subject import Subject, scoped
from rana_kernels.evaluation.density import Costs
from rana_kernels.layer import Layer
from rana_kernels.methods.split import threshold_for


class MaskedLinear(nn.Module):
    """A linear that sees no input i with |x_i|·scale_i below the threshold. scale [K] float32."""

    def __init__(self, linear: nn.Module, scale: Tensor, threshold: float) -> None:
        super().__init__()
        self.linear, self.scale, self.threshold = linear, scale, threshold

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        return {"": x.float().abs() * self.scale >= self.threshold}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.where(self.masks(x)[""], x, 0))


class MaskedActivation(nn.Module):
    """An activation whose values below the threshold are zero."""

    def __init__(self, act: nn.Module, threshold: float) -> None:
        super().__init__()
        self.act, self.threshold = act, threshold

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        return {"": self.act(x).abs() >= self.threshold}

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        return torch.where(y.abs() >= self.threshold, y, 0)


def mask_inputs(subject: Subject, scope: str, keep: float, *, weighted: bool) -> tuple[nn.Module, Costs]:
    """TEAL, or `weighted` WINA: a copy of the model whose linears in `scope` see `keep` of their inputs."""
    model, _ = subject.copy()
    rows, dense = {}, 0
    for block in subject.blocks:
        layer = Layer(subject.dense, block, subject.stats)
        for name in scoped(block, scope):
            x, weight = layer.sample(layer.input_of((name,))), layer.linear(name).weight
            scale = layer.scale(name) if weighted else torch.ones(x.shape[1], device=x.device)
            threshold, _ = threshold_for(x.abs() * scale, keep * x.shape[1])
            model.set_submodule(name, MaskedLinear(model.get_submodule(name), scale, threshold))
            rows[name] = len(weight)
            dense += weight.numel()
    return model, Costs(dense, 0, rows)


def mask_gates(subject: Subject, scope: str, keep: float) -> tuple[nn.Module, Costs]:
    """CATS: a copy of the model that computes the neurons with large gates, at `keep` of the cost of `scope`.

    Raises ValueError for an MLP without a gate of its own, or a budget below what stays dense.
    """
    model, _ = subject.copy()
    cost = {name: subject.dense.get_submodule(name).weight.numel() for name in subject.linears(scope)}
    masked = sum(cost.get(name, 0) for block in subject.blocks for name in (block.up, block.down))
    dense = sum(cost.values())
    share = (keep * dense - (dense - masked)) / masked if masked else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"CATS leaves {1 - masked / dense:.2f} of the cost dense, wanted {keep}")
    rows = {}
    for block in subject.blocks:
        if not block.act or block.gate in ("", block.up):
            raise ValueError("CATS needs an MLP with a gate of its own")
        layer = Layer(subject.dense, block, subject.stats)
        gates = layer.act(layer.dense(block.gate, layer.sample("mlp")))
        threshold, _ = threshold_for(gates.abs(), share * gates.shape[1])
        model.set_submodule(block.act, MaskedActivation(model.get_submodule(block.act), threshold))
        rows[block.act] = (cost[block.up] + cost[block.down]) // gates.shape[1]
    return model, Costs(dense, dense - masked, rows)
