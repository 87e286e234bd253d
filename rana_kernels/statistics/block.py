"""A calibrated block: the weights of a transformer block, its statistics, and factors that are computed once.

Allocation and compression both need factors. One CalibratedBlock at a time, used for both, decomposes every
linear once and holds the factors of one block only.
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
    """In all methods, `names` are linears that read the same input, in the order of their rows."""

    def __init__(self, model: nn.Module, block: Block, stats: Stats) -> None:
        self.model, self.block, self.stats = model, block, stats
        self._factors: dict[tuple[tuple[str, ...], str], Factors] = {}
        self._samples: dict[str, Tensor] = {}

    def linear(self, name: str) -> Linear:
        return linear_of(self.model, name)

    def weight(self, names: tuple[str, ...]) -> Tensor:
        """Return the stacked weights [N, K] in their own dtype."""
        weights = [self.linear(name).weight.detach() for name in names]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the biases [N], with zeros for a linear without one, or None if no linear has one."""
        linears = [self.linear(name) for name in names]
        if all(linear.bias is None for linear in linears):
            return None
        parts = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears]
        return torch.cat(parts)

    def sample(self, name: str) -> Tensor:
        """Return the sampled tokens [T, K] float32 of an input of this block ("qkv", "o", "mlp" or "down").

        The input of down is computed from that of the MLP, so its sample need not be collected.
        """
        if name not in self._samples:
            found = (
                self._expanded(self.sample("mlp"))
                if name == "down"
                else self.stats.of(self.block.index, name).sample
            )
            self._samples[name] = found.float()
        return self._samples[name]

    def importance(self, name: str) -> Tensor | None:
        """Return the importance [T] float32 of the tokens of `sample(name)`, or None if it is not known."""
        found = self.stats.importance.get((self.block.index, name))
        return None if found is None else found.to(self.sample(name).device)

    def paired(self, name: str) -> Tensor:
        """Return the tokens [P, K] float32 of an input of this block whose slopes are known."""
        if name == "down":
            return self._expanded(self.paired("mlp"))
        return self.stats.paired[self.block.index, name].float()

    def slopes(self, name: str) -> Tensor:
        """Return the derivatives [P, K] float32 of the loss by the input of a linear, through it alone."""
        if name not in self.stats.slopes:
            raise ValueError(f"the statistics have no gradients of {name}: calibrate with gradients=True")
        return self.stats.slopes[name].float()

    def input_of(self, names: tuple[str, ...]) -> str:
        """Return which input `names` read: "qkv", "o", "mlp" or "down"."""
        return next(key for key, readers in self.block.inputs.items() if set(names) <= set(readers))

    def factors(self, names: tuple[str, ...], metric: str = "output") -> Factors:
        """Return the factors of the stacked weights for a metric, "output" or "loss"."""
        if (names, metric) not in self._factors:
            moment = self.stats.of(self.block.index, self.input_of(names)).moment
            weight = self.weight(names)
            if not weight.isfinite().all():
                raise ValueError(f"the weights of {' or '.join(names)} hold values that are not finite")
            d = self.output_weights(names) if metric == "loss" else None
            self._factors[names, metric] = decompose(weight, moment.to(weight.device), d)
        return self._factors[names, metric]

    def output_weights(self, names: tuple[str, ...]) -> Tensor:
        """Return factors [N] float64 for output errors: their scaled squares estimate the rise in loss."""
        missing = [name for name in names if name not in self.stats.gradients]
        if missing:
            raise ValueError(
                f"the statistics have no gradients of {missing[0]}: calibrate with gradients=True"
            )
        squares = torch.cat([self.stats.gradients[name] for name in names])
        # an output without any gradient still counts a little, because its errors must not be free
        return squares.clamp_min(1e-4 * float(squares.mean()) or 1.0).sqrt().to(self.weight(names[:1]).device)

    def rank_values(self, names: tuple[str, ...], metric: str = "output") -> Tensor:
        """Return h [T, F] float32 of the sample, computed from B in its stored dtype."""
        return self.sample(self.input_of(names)) @ self.factors(names, metric).B.float().T

    def rank_scores(self, names: tuple[str, ...], metric: str = "output") -> Tensor:
        """Return the scores [T, F] float32 of the rank values of the sample in the metric."""
        return self.rank_values(names, metric) / self.factors(names, metric).norms

    def neuron_norms(self, name: str, metric: str = "output") -> Tensor:
        """Return the norms [K] float32: ‖W_:,i‖₂ of every input feature, with W weighted by the metric."""
        return self.joint_norms((name,), metric)

    def joint_norms(self, names: tuple[str, ...], metric: str = "output") -> Tensor:
        """Return the norms [K] float32 of the stacked weights, as `neuron_norms` of one linear.

        In the metric of the loss they are the root mean squares of the slopes by each input.
        """
        if metric == "output":
            return self.weight(names).float().norm(dim=0)
        squares = torch.stack([self.slopes(name).square().mean(0) for name in names]).sum(0)
        # an input without any slope still counts a little, because its errors must not be free
        return squares.clamp_min(1e-8 * float(squares.mean()) or 1.0).sqrt()

    def act(self, h: Tensor) -> Tensor:
        """Apply the activation of the block's MLP."""
        if self.block.act:
            return self.model.get_submodule(self.block.act)(h)
        assert self.block.activation is not None, "find_blocks and describe see to it"
        return reference.activate(h, self.block.activation)

    def neurons(self, *expanded: Tensor) -> Tensor:
        """Return the input of down for the outputs of `block.expanding`."""
        gate, up = expanded if len(expanded) == 2 else (None, expanded[0])
        if gate is None and self.block.gate:
            gate, up = up.chunk(2, dim=-1)
        return combine(up, gate, self.act)

    def dense(self, name: str, x: Tensor) -> Tensor:
        """Return the outputs of the original linear, in float32."""
        bias = self.bias((name,))
        return F.linear(x, self.weight((name,)).float(), None if bias is None else bias.float())

    def _expanded(self, x: Tensor) -> Tensor:
        """Return the input of down for the input x of the MLP."""
        return self.neurons(*(self.dense(name, x) for name in self.block.expanding))
