"""The paper's allocation, and the baseline it is compared with: the same share for every layer.

paper     RaNA, arXiv 2503.18216, algorithms 1 and 2: q, k, v jointly, up and gate get rank
          adapters, down a neuron adapter, o stays dense; within an MLP the shares of up, gate and
          down minimise the MLP's own output error
static    the plain data-aware low-rank baseline: the same linears and budget, all ranks always on
"""

import math
from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor, nn

from rana_kernels.layer import Layer, linear_of
from rana_kernels.methods.adapters import dense_adapter, make_adapter
from rana_kernels.methods.prices import MULTIPLY_ADDS
from rana_kernels.methods.split import ROUNDING, Split, Splits, smallest_budget, threshold_for
from rana_kernels.models import Block
from rana_kernels.plan import Adapter

# the search of algorithm 2: shares of gate, up and down in an MLP's budget, in eighteenths; where one
# linear is both gate and up, or there is no gate, of that linear and down
SHARES = {
    3: tuple(s for s in product(range(3, 10), repeat=3) if sum(s) == 18),
    2: tuple((s, 18 - s) for s in range(5, 16)),
}
MLP_TOKENS = 1024  # of the sample: the search runs the MLP once for each combination


def keep_for(model: nn.Module, blocks: Iterable[Block], flops_reduction: float, method: str) -> float:
    """The share of their dense cost that the adapted linears keep, the same for all of them: they
    take the cut of the dense ones too."""
    total = adapted = 0
    smallest = 0.0
    for block in blocks:
        cost = {name: linear_of(model, name).weight.numel() for name in block.linears}
        total += sum(cost.values())
        adapted += sum(cost.values()) - cost.get(block.o, 0)
        for names in filter(None, (block.qkv, *((name,) for name in block.expanding))):
            K = linear_of(model, names[0]).in_features
            dense = sum(cost[name] for name in names)
            smallest = max(smallest, smallest_budget(MULTIPLY_ADDS.rank(K, dense // K)) / dense)
    most = (1 - smallest) * adapted / total
    if not 0 < flops_reduction <= most:
        raise ValueError(
            f"flops_reduction is {flops_reduction}, wanted more than 0 and at most {int(most * 1000) / 1000} "
            f"(method {method!r} leaves {1 - adapted / total:.3f} of this model's block FLOPs dense)"
        )
    return 1 - flops_reduction * total / adapted


def plan_layer(layer: Layer, keep: float, method: str) -> list[Adapter]:
    """The adapters of one block, in the order in which the model calls its linears."""
    linear_plan: Callable[[Layer, tuple[str, ...], float], Adapter]
    linear_plan = rank_adapter if method == "paper" else static_adapter
    block = layer.block
    attention = [linear_plan(layer, block.qkv, keep)] if block.qkv else []
    attention += [dense_adapter(layer, block.o)] if block.o else []
    if not block.down:
        return attention
    if method == "paper":
        return [*attention, *_paper_mlp(layer, keep)]
    return [*attention, *(linear_plan(layer, (n,), keep) for n in (*block.expanding, block.down))]


def rank_adapter(layer: Layer, names: tuple[str, ...], keep: float) -> Adapter:
    """The best rank adapter for `names` (several: decomposed jointly) at `keep` of their dense cost."""
    K, width = layer.weight(names).shape[1], sum(layer.linear(name).out_features for name in names)
    split = Splits(layer.rank_values(names), MULTIPLY_ADDS.rank(K, width)).exact(keep * K * width)
    return make_adapter(layer, "rank", names, split.rank, split.live, split.threshold)


def static_adapter(layer: Layer, names: tuple[str, ...], keep: float) -> Adapter:
    """As many ranks as `keep` of the dense cost pays for, all of them always on."""
    K, width = layer.weight(names).shape[1], sum(layer.linear(name).out_features for name in names)
    rank = max(1, int(keep * K * width / (K + width)))
    return make_adapter(layer, "rank", names, rank, rank, 0.0)


def neuron_adapter(layer: Layer, name: str, live: float, x: Tensor) -> Adapter:
    """A neuron adapter that keeps `live` of the inputs `x` [T, K] on average."""
    threshold, kept = threshold_for(x.abs() * layer.scale(name), live)
    return make_adapter(layer, "neuron", (name,), x.shape[1], kept, threshold)


def _paper_mlp(layer: Layer, keep: float) -> list[Adapter]:
    """Algorithm 2: try every way to share the MLP's budget, keep the one with the least output error."""
    block = layer.block
    some = slice(None, None, -(-len(layer.sample("mlp")) // MLP_TOKENS))
    linears = (*block.expanding, block.down)
    unit = keep * sum(layer.weight((name,)).numel() for name in linears) / 18
    expanding = [_Expanded(layer, name, unit, some) for name in block.expanding]
    exact = layer.sample("down")[some]
    down, scale = layer.weight((block.down,)).float(), layer.scale(block.down)
    best, best_error = (18 // len(linears),) * len(linears), math.inf
    for shares in SHARES[len(linears)]:
        live = shares[-1] * unit / down.shape[0]
        if live > down.shape[1] or not all(e.affords(s) for e, s in zip(expanding, shares, strict=False)):
            continue
        g = layer.neurons(*(e.output(s) for e, s in zip(expanding, shares, strict=False)))
        threshold, _ = threshold_for(g.abs() * scale, live)
        dropped = exact - torch.where(g.abs() * scale < threshold, 0, g)
        error = float((dropped @ down.T).square().sum())
        if error < best_error:
            best, best_error = shares, error
    chosen = list(zip(expanding, best, strict=False))
    g = layer.neurons(*(e.output(s) for e, s in chosen))
    neurons = neuron_adapter(layer, block.down, best[-1] * unit / down.shape[0], g)
    return [*(e.adapter(s) for e, s in chosen), neurons]


class _Expanded:
    """One of gate and up (or both in one) at every share of the MLP's budget, of `unit` multiply-adds
    each: its split, and its output on `some` tokens."""

    def __init__(self, layer: Layer, name: str, unit: float, some: slice) -> None:
        self.layer, self.name, self.unit, self.some = layer, name, unit, some
        self.h, self.factors = layer.rank_values((name,)), layer.factors((name,))
        self.N, self.K = layer.weight((name,)).shape
        self.line = MULTIPLY_ADDS.rank(self.K, self.N)
        self._all, self._splits = Splits(self.h, self.line), dict[int, Split]()
        self._outputs: dict[int, Tensor] = {}

    def affords(self, share: int) -> bool:
        least = smallest_budget(self.line) * (1 - ROUNDING)
        return least <= share * self.unit <= self.K * self.N

    def adapter(self, share: int) -> Adapter:
        split = self._split(share)
        return make_adapter(self.layer, "rank", (self.name,), split.rank, split.live, split.threshold)

    def output(self, share: int) -> Tensor:
        """[tokens, N] float32, bias included."""
        if share not in self._outputs:
            split, bias = self._split(share), self.layer.bias((self.name,))
            h, threshold = self.h[self.some, : split.rank], split.threshold or 0.0
            z = torch.where(h.abs() < threshold, 0, h)
            y = z @ self.factors.rows[: split.rank].float()
            self._outputs[share] = y if bias is None else y + bias
        return self._outputs[share]

    def _split(self, share: int) -> Split:
        if share not in self._splits:
            self._splits[share] = self._all.exact(share * self.unit)
        return self._splits[share]
