"""One block at work: its weights, its statistics, and their factors, each computed once.

Allocation and compression both ask for factors. Going through a model block by block with one
`Layer` for each decomposes every linear once and holds the factors of one block at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import Linear, linear_of
from rana_kernels.ops import reference
from rana_kernels.ops.mlp import combine
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.decomposition import Factors, decompose


class CalibratedBlock:
    """`names` are full module names of linears that read the same input, in the order of their rows."""

    def __init__(self, model: nn.Module, block: Block, stats: Stats) -> None:
        self.model, self.block, self.stats = model, block, stats
        self._factors: dict[tuple[tuple[str, ...], str], Factors] = {}
        self._samples: dict[str, Tensor] = {}

    def linear(self, name: str) -> Linear:
        return linear_of(self.model, name)

    def weight(self, names: tuple[str, ...]) -> Tensor:
        """[N, K], the weights stacked, in their own dtype."""
        weights = [self.linear(name).weight.detach() for name in names]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        """[N], zeros for a linear without one; None if none has one."""
        linears = [self.linear(name) for name in names]
        if all(linear.bias is None for linear in linears):
            return None
        parts = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears]
        return torch.cat(parts)

    def sample(self, name: str) -> Tensor:
        """[T, K] float32: the sampled tokens of an input of this block ("qkv", "o", "mlp", "down").

        What down reads follows from what the MLP reads, and is computed rather than collected.
        """
        if name not in self._samples:
            found = self._down_input() if name == "down" else self.stats.of(self.block.index, name).sample
            self._samples[name] = found.float()
        return self._samples[name]

    def input_of(self, names: tuple[str, ...]) -> str:
        return next(key for key, readers in self.block.inputs.items() if set(names) <= set(readers))

    def factors(self, names: tuple[str, ...], metric: str = "output") -> Factors:
        """Decomposed in a metric of `Adapter.metric`."""
        if (names, metric) not in self._factors:
            moment = self.stats.of(self.block.index, self.input_of(names)).moment
            weight = self.weight(names)
            if not weight.isfinite().all():
                raise ValueError(f"the weights of {' or '.join(names)} hold values that are not finite")
            d = self.metric(names) if metric == "loss" else None
            self._factors[names, metric] = decompose(weight, moment.to(weight.device), d)
        return self._factors[names, metric]

    def metric(self, names: tuple[str, ...]) -> Tensor:
        """[N] float64: by what to multiply errors of outputs so that their squares count in the loss."""
        missing = [name for name in names if name not in self.stats.gradients]
        if missing:
            raise ValueError(
                f"the statistics have no gradients of {missing[0]}: calibrate with gradients=True"
            )
        squares = torch.cat([self.stats.gradients[name] for name in names])
        # an output that the loss never saw still counts a little: its errors must not be free
        return squares.clamp_min(1e-4 * float(squares.mean()) or 1.0).sqrt().to(self.weight(names[:1]).device)

    def rank_values(self, names: tuple[str, ...], metric: str = "output") -> Tensor:
        """h [T, F] float32 of the sample, from B as it will be stored."""
        return self.sample(self.input_of(names)) @ self.factors(names, metric).B.float().T

    def rank_scores(self, names: tuple[str, ...], metric: str = "output") -> Tensor:
        """[T, F] float32: what each rank value of the sample weighs in the metric."""
        return self.rank_values(names, metric) / self.factors(names, metric).norms

    def neuron_norms(self, name: str, metric: str = "output") -> Tensor:
        """‖W_:,i‖₂ of each input, [K] float32: what a unit of that input weighs in the metric."""
        return self.weighted((name,), metric).norm(dim=0)

    def weighted(self, names: tuple[str, ...], metric: str) -> Tensor:
        """[N, K] float32: the weights, each output multiplied by what its errors count."""
        weight = self.weight(names).float()
        return weight if metric == "output" else self.metric(names).float()[:, None] * weight

    def act(self, h: Tensor) -> Tensor:
        if self.block.act:
            return self.model.get_submodule(self.block.act)(h)
        assert self.block.activation is not None, "find_blocks and describe see to it"
        return reference.activate(h, self.block.activation)

    def neurons(self, *expanded: Tensor) -> Tensor:
        """Return what down reads, from the outputs of `block.expanding`."""
        gate, up = expanded if len(expanded) == 2 else (None, expanded[0])
        if gate is None and self.block.gate:
            gate, up = up.chunk(2, dim=-1)
        return combine(up, gate, self.act)

    def dense(self, name: str, x: Tensor) -> Tensor:
        """The linear as it is, in float32."""
        bias = self.bias((name,))
        return F.linear(x, self.weight((name,)).float(), None if bias is None else bias.float())

    def _down_input(self) -> Tensor:
        x = self.sample("mlp")
        return self.neurons(*(self.dense(name, x) for name in self.block.expanding))
