"""The allocation of the paper and its baseline: both give every adapted linear the same cost ratio.

paper     RaNA (arXiv 2503.18216, algorithms 1 and 2): q, k and v share a rank adapter, up and gate get one
          each, down gets a neuron adapter, and o stays dense. The MLP's budget is shared among up, gate and
          down so that the error of the MLP's output is least
static    plain low rank fitted to the data: the same linears and the same budget, but all ranks are always on
"""

import math
from abc import abstractmethod
from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn

from rana_kernels.allocation.cost import MULTIPLY_ADDS, ROUNDING
from rana_kernels.allocation.method import Chooser, Method
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.specs import dense_spec, make_spec
from rana_kernels.allocation.split import Split, Splits, smallest_budget
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.thresholds import evenly, threshold_for

# Algorithm 2 tries these shares of an MLP's budget, in eighteenths: (gate, up, down), or (up, down) where one
# linear is both gate and up or there is no gate.
SHARES = {
    3: tuple(s for s in product(range(3, 10), repeat=3) if sum(s) == 18),
    2: tuple((s, 18 - s) for s in range(5, 16)),
}
MLP_TOKENS = 1024  # of the sample: the search runs the MLP once for each combination of shares


class Uniform(Method):
    """A method that gives every adapted linear the same cost ratio. o stays dense."""

    def check(self, model: nn.Module, blocks: list[Block], request: Request) -> None:
        super().check(model, blocks, request)
        uniform_cost_ratio(model, blocks, request)

    def prepare(
        self, stats: Stats, request: Request, store: ResumeDir | None = None, progress: bool = True
    ) -> Chooser:
        cost_ratio = uniform_cost_ratio(stats.model, stats.blocks, request)
        return lambda calibrated: self.plan_block(calibrated, cost_ratio)

    def plan_block(self, calibrated: CalibratedBlock, cost_ratio: float) -> list[AdapterSpec]:
        """Return the adapters of one block, in the order in which the model calls its linears."""
        block = calibrated.block
        attention = [self.plan_linears(calibrated, block.qkv, cost_ratio)] if block.qkv else []
        attention += [dense_spec(calibrated, block.o)] if block.o else []
        return [*attention, *(self.plan_mlp(calibrated, cost_ratio) if block.down else [])]

    @abstractmethod
    def plan_linears(
        self, calibrated: CalibratedBlock, names: tuple[str, ...], cost_ratio: float
    ) -> AdapterSpec:
        """Return one adapter for linears that read one input."""

    @abstractmethod
    def plan_mlp(self, calibrated: CalibratedBlock, cost_ratio: float) -> list[AdapterSpec]:
        """Return the adapters of the block's MLP."""


class Paper(Uniform):
    name = "paper"
    summary = "RaNA as published"
    needs = {"inputs": ("qkv", "mlp"), "gradients": False}

    def plan_linears(
        self, calibrated: CalibratedBlock, names: tuple[str, ...], cost_ratio: float
    ) -> AdapterSpec:
        return rank_spec(calibrated, names, cost_ratio)

    def plan_mlp(self, calibrated: CalibratedBlock, cost_ratio: float) -> list[AdapterSpec]:
        return _paper_mlp(calibrated, cost_ratio)


class Static(Uniform):
    name = "static"
    summary = "plain low rank"
    needs = {"inputs": ("qkv", "mlp", "down"), "gradients": False}

    def plan_linears(
        self, calibrated: CalibratedBlock, names: tuple[str, ...], cost_ratio: float
    ) -> AdapterSpec:
        return static_spec(calibrated, names, cost_ratio)

    def plan_mlp(self, calibrated: CalibratedBlock, cost_ratio: float) -> list[AdapterSpec]:
        block = calibrated.block
        return [static_spec(calibrated, (name,), cost_ratio) for name in (*block.expanding, block.down)]


def uniform_cost_ratio(model: nn.Module, blocks: Iterable[Block], request: Request) -> float:
    """Return the one cost ratio of all adapted linears that meets the request.

    The adapted linears make the whole saving, because o stays dense. Raises ValueError for a request out of
    reach.
    """
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
    most, asked = (1 - smallest) * adapted / total, request.reduction
    if not 0 < asked <= most:
        raise ValueError(
            f"flops_reduction is {asked}, wanted more than 0 and at most {int(most * 1000) / 1000} "
            f"(method {request.method!r} leaves {1 - adapted / total:.3f} of this model's block FLOPs dense)"
        )
    return 1 - asked * total / adapted


def rank_spec(calibrated: CalibratedBlock, names: tuple[str, ...], cost_ratio: float) -> AdapterSpec:
    """Return the best rank adapter for `names` (several are decomposed jointly) at `cost_ratio`."""
    N, K = calibrated.weight(names).shape
    split = Splits(calibrated.rank_values(names), MULTIPLY_ADDS.rank(K, N)).exact(cost_ratio * K * N)
    return make_spec(calibrated, "rank", names, split.rank, split.live, split.threshold)


def static_spec(calibrated: CalibratedBlock, names: tuple[str, ...], cost_ratio: float) -> AdapterSpec:
    """Return the adapter with as many ranks as `cost_ratio` pays for, all of them always on."""
    N, K = calibrated.weight(names).shape
    rank = max(1, int(cost_ratio * K * N / (K + N)))
    return make_spec(calibrated, "rank", names, rank, rank, 0.0)


def neuron_spec(calibrated: CalibratedBlock, name: str, live: float, x: Tensor) -> AdapterSpec:
    """Return a neuron adapter that keeps `live` of the inputs `x` [T, K] on average."""
    threshold, found = threshold_for(x.abs() * calibrated.neuron_norms(name), live)
    return make_spec(calibrated, "neuron", (name,), x.shape[1], found, threshold)


def _paper_mlp(calibrated: CalibratedBlock, cost_ratio: float) -> list[AdapterSpec]:
    """Run algorithm 2: try all SHARES of the MLP's budget and return the adapters of least output error."""
    block = calibrated.block
    some = evenly(len(calibrated.sample("mlp")), MLP_TOKENS)
    linears = (*block.expanding, block.down)
    unit = cost_ratio * sum(calibrated.weight((name,)).numel() for name in linears) / 18
    expanding = [_Expanded(calibrated, name, unit, some) for name in block.expanding]
    exact = calibrated.sample("down")[some]
    down, norms = calibrated.weight((block.down,)).float(), calibrated.neuron_norms(block.down)
    best, best_error = (18 // len(linears),) * len(linears), math.inf
    for shares in SHARES[len(linears)]:
        live = shares[-1] * unit / down.shape[0]
        if live > down.shape[1] or not all(e.affords(s) for e, s in zip(expanding, shares[:-1], strict=True)):
            continue
        g = calibrated.neurons(*(e.output(s) for e, s in zip(expanding, shares[:-1], strict=True)))
        threshold, _ = threshold_for(g.abs() * norms, live)
        difference = exact - torch.where(g.abs() * norms < threshold, 0, g)
        error = float((difference @ down.T).square().sum())
        if error < best_error:
            best, best_error = shares, error
    chosen = list(zip(expanding, best[:-1], strict=True))
    g = calibrated.neurons(*(e.output(s) for e, s in chosen))
    neurons = neuron_spec(calibrated, block.down, best[-1] * unit / down.shape[0], g)
    return [*(e.adapter(s) for e, s in chosen), neurons]


class _Expanded:
    """Adapters of gate or up (or of one linear that is both) for different shares of the MLP's budget.

    unit   the multiply-adds of a share of 1
    some   the tokens of the sample that `output` computes
    """

    def __init__(self, calibrated: CalibratedBlock, name: str, unit: float, some: slice) -> None:
        self.calibrated, self.name, self.unit, self.some = calibrated, name, unit, some
        self.h, self.factors = calibrated.rank_values((name,)), calibrated.factors((name,))
        self.N, self.K = calibrated.weight((name,)).shape
        self.line = MULTIPLY_ADDS.rank(self.K, self.N)
        self._all, self._splits = Splits(self.h, self.line), dict[int, Split]()
        self._outputs: dict[int, Tensor] = {}

    def affords(self, share: int) -> bool:
        """Say whether the share pays for the smallest adapter, and for no more than the dense linear."""
        least = smallest_budget(self.line) * (1 - ROUNDING)
        return least <= share * self.unit <= self.K * self.N

    def adapter(self, share: int) -> AdapterSpec:
        split = self._split(share)
        return make_spec(self.calibrated, "rank", (self.name,), split.rank, split.live, split.threshold)

    def output(self, share: int) -> Tensor:
        """Return the outputs [tokens, N] float32 of the adapter, bias included."""
        if share not in self._outputs:
            split, bias = self._split(share), self.calibrated.bias((self.name,))
            h, threshold = self.h[self.some, : split.rank], split.threshold or 0.0
            z = torch.where(h.abs() < threshold, 0, h)
            y = z @ self.factors.rows[: split.rank].float()
            self._outputs[share] = y if bias is None else y + bias
        return self._outputs[share]

    def _split(self, share: int) -> Split:
        if share not in self._splits:
            self._splits[share] = self._all.exact(share * self.unit)
        return self._splits[share]
