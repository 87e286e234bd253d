"""The baselines that keep the weights and skip inputs: TEAL, WINA and CATS, in plain PyTorch.

TEAL   (arXiv 2408.14690) zeroes inputs of every linear by |x_i|
WINA   (arXiv 2505.19427) by |x_i|·‖W_:,i‖₂
CATS   (arXiv 2404.08763) zeroes the gate's activations by size; up and down skip those neurons, and the gate
       and attention stay dense

Thresholds are quantiles of a sample of the calibration text, with the same share for every linear; TEAL is
also measured with its search for a share of each linear (`greedy.py`). We leave out WINA's top k of each
token, and WINA's rotation of the weights. This code measures what the masks lose. It is not fast.
"""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality import greedy
from bench.quality.subject import Candidate, Subject, scoped
from rana_kernels.evaluation.density import Costs
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.thresholds import threshold_for

LEAST = 0.2  # the lowest cost of TEAL's search


class Masked(nn.Module):
    """Keeps the values whose `scores` reach the threshold."""

    threshold = 0.0

    def scores(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        return {"": self.scores(x) >= self.threshold}

    def fit(self, x: Tensor, live: float) -> None:
        """Set the threshold at which tokens like those of `x` keep `live` values on average."""
        self.threshold, _ = threshold_for(self.scores(x).flatten(0, -2), live)


class MaskedLinear(Masked):
    """A linear that reads zero for an input i with |x_i|·norms_i below the threshold. norms [K] float32."""

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


def mask_inputs(subject: Subject, scope: str, cost_ratio: float, *, weighted: bool) -> Candidate:
    """Return TEAL, or `weighted` WINA: a copy whose linears in `scope` read `cost_ratio` of their inputs."""
    return _masked(subject, dict.fromkeys(subject.linears(scope), cost_ratio), weighted)


def mask_greedily(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
    """Return TEAL with its search for a share of each linear. `scope` must be "both": see `WHOLE`."""
    shares: greedy.Shares = {}
    for block, path in zip(subject.blocks, _paths(subject), strict=True):
        cost = {name: subject.dense.get_submodule(name).weight.numel() for name in scoped(block, scope)}
        shares |= greedy.shares_at(path, cost, cost_ratio)
    return _masked(subject, shares, weighted=False)


@lru_cache(maxsize=1)
def _paths(subject: Subject) -> list[list[greedy.Shares]]:
    """Return the steps of every block, which serve all budgets."""
    model, _ = subject.copy()
    arguments, found = greedy.arguments_of(subject), []
    for block in subject.blocks:
        calibrated = CalibratedBlock(subject.dense, block, subject.stats)
        names = scoped(block, "both")
        inputs = {name: calibrated.sample(calibrated.input_of((name,))) for name in names}
        masked = {name: _mask(model, name, torch.ones(inputs[name].shape[1])) for name in names}
        name = greedy.layer_name(block)
        path = greedy.GreedyPath(model.get_submodule(name), masked, inputs)
        found.append(path.steps(arguments[name], until=LEAST))
    return found


def _masked(subject: Subject, shares: greedy.Shares, weighted: bool) -> Candidate:
    """Return a copy whose linears read these shares of their inputs."""
    model, _ = subject.copy()
    put_masks(model, subject, shares, weighted)
    weights = {name: subject.dense.get_submodule(name).weight for name in shares}
    dense = sum(weight.numel() for weight in weights.values())
    return Candidate(model, Costs(dense, 0, {name: len(w) for name, w in weights.items()}), subject.dense)


def put_masks(model: nn.Module, subject: Subject, shares: greedy.Shares, weighted: bool) -> None:
    """Let linears of a model made of the subject read these shares of their inputs, in place."""
    for block in subject.blocks:
        calibrated = CalibratedBlock(subject.dense, block, subject.stats)
        for name in (name for name in scoped(block, "both") if name in shares):
            x = calibrated.sample(calibrated.input_of((name,)))
            norms = calibrated.neuron_norms(name) if weighted else torch.ones(x.shape[1], device=x.device)
            _mask(model, name, norms).fit(x, shares[name] * x.shape[1])


def _mask(model: nn.Module, name: str, norms: Tensor) -> MaskedLinear:
    """Put a mask before a linear, in place."""
    masked = MaskedLinear(model.get_submodule(name), norms)
    model.set_submodule(name, masked)
    return masked


def mask_gates(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
    """Return CATS: a copy that computes the neurons with large gates, at `cost_ratio` of the cost of `scope`.

    Raise ValueError for an MLP without a gate of its own, or a budget below what stays dense.
    """
    model, _ = subject.copy()
    cost = {name: subject.dense.get_submodule(name).weight.numel() for name in subject.linears(scope)}
    skipped = sum(cost.get(name, 0) for block in subject.blocks for name in (block.up, block.down))
    dense = sum(cost.values())
    share = (cost_ratio * dense - (dense - skipped)) / skipped if skipped else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"CATS leaves {1 - skipped / dense:.2f} of the cost dense, wanted {cost_ratio}")
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
    return Candidate(model, Costs(dense, dense - skipped, rows), subject.dense)


@torch.no_grad()
def refit(model: Any, token_ids: Tensor, live: dict[str, float]) -> None:
    """Set new thresholds after weights have changed, so that each mask keeps `live` on token_ids [n, T].

    One pass is enough: a mask is fitted before it is used, to the output of the masks fitted before it.
    """

    def fit(name: str, module: Masked, args: tuple[Tensor, ...]) -> None:
        module.fit(args[0], live[name])

    masked = {name: module for name, module in model.named_modules() if isinstance(module, Masked)}
    hooks = [module.register_forward_pre_hook(partial(fit, name)) for name, module in masked.items()]
    try:
        model(input_ids=token_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
