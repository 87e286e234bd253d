"""The benchmarked layers: adapters and a dense linear, each beside its baselines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from bench.kernels.baselines import Layer, baselines, one_linear
from bench.kernels.quantized import GROUP, bytes_a_value, cloned, quantize, rivals
from bench.kernels.weights import DTYPES, Call, copies, far, transposed, turns, weight
from rana_kernels import ops
from rana_kernels.ops import reference
from rana_kernels.ops.quantized import dequantize

Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contenders:
    """Calls that take turns over copies of their weights.

    bytes   of weights that ours must read: B, and the rows that any token keeps
    flops   of ours: two a multiply-add, for the rows that each token keeps
    error   of ours, ‖y - exact‖ / ‖exact‖ against the reference in float64; computed when called
    """

    calls: dict[str, Call]
    bytes: float
    flops: float
    error: Callable[[], float]


class Case:
    """One adapter for M tokens. Its tensors, `Weights`, are the arguments of its op, in their order.

    op              the op's name
    layer           the dense layer that it replaces
    factors         the places of its weights that dense products take transposed
    shapes          [N, K] of the dense weights
    multiply_adds   of one token, on average
    adapter         x -> random weights, with thresholds at which x keeps as many rows as the case says
    values_read     x, weights -> how many values of the weights x must read
    in_torch        x, *weights -> the op in torch's own operations, from transposed factors
    in_parts        the same in separate ops, or None
    scales          the places of its weights that may be quantised, with the argument for the scale of each
    bits            None: float weights beside float baselines. 16, 8 or 4: weights in so many bits beside the
                    same op in 16 bits, the dense layer in 16 bits and torch's quantised ones
    """

    name: str
    M: int
    dtype: str
    op: str
    layer: Layer = staticmethod(one_linear)
    factors: tuple[int, ...]
    shapes: list[tuple[int, int]]
    multiply_adds: int
    adapter: Callable[[Tensor], Weights]
    values_read: Callable[[Tensor, Weights], int]
    in_torch: Callable[..., Tensor]
    in_parts: Callable[..., Tensor] | None = None
    scales: Mapping[int, str]
    bits: int | None = None

    @property
    def cost_ratio(self) -> float:
        return self.multiply_adds / sum(N * K for N, K in self.shapes)

    def inputs(self, device: str = "cpu") -> Tensor:
        return torch.randn(self.M, self.shapes[0][1], device=device).to(DTYPES[self.dtype])

    @property
    def width(self) -> str:
        """Return the end of the case's name."""
        if self.bits is None:
            return self.dtype
        return f"{self.dtype}, {self.bits} bits" + (f" g{GROUP}" if self.bits < 16 else "")

    def run(self, x: Tensor, *weights: Tensor, served: ModuleType = ops, **scales: Tensor) -> Tensor:
        return getattr(served, self.op)(x, *weights, **scales)

    def contenders(self) -> Contenders:
        return self._beside_floats() if self.bits is None else self._beside_quantized(self.bits)

    def _beside_quantized(self, bits: int) -> Contenders:
        x, read = self.inputs(), self.multiply_adds * bytes_a_value(bits)
        floats = self.adapter(x)
        ours, exact = self.in_bits(floats)
        dense = tuple(weight(*shape, like=x) for shape in self.shapes)
        calls = {
            "dense": turns(self.layer, cloned((x, *dense))),
            **rivals(x, self.shapes, self.layer),
            "rana": turns(partial(self.run_in_bits, x), cloned(ours, read)),
        }
        if bits < 16:
            calls["rana bf16"] = turns(partial(self.run, x), cloned(floats, 2 * self.multiply_adds))

        def error() -> float:
            wanted = self.run(x.double(), *(t.double() for t in exact), served=reference)
            return float((self.run_in_bits(x, *ours).double() - wanted).norm() / wanted.norm())

        touched = bytes_a_value(bits) * self.values_read(x, exact)
        return Contenders(calls, touched, 2 * self.M * self.multiply_adds, error)

    def in_bits(self, floats: Weights) -> tuple[Weights, Weights]:
        """Return the weights with their scales after them, and the float weights that these stand for."""
        bits = self.bits or 16
        if bits == 16:
            return floats, floats
        pairs = {place: quantize(floats[place], bits) for place in self.scales}
        merge = lambda found: tuple(found.get(i, t) for i, t in enumerate(floats))  # noqa: E731
        weights = merge({place: q for place, (q, _) in pairs.items()})
        exact = merge({place: dequantize(q, scale) for place, (q, scale) in pairs.items()})
        return (*weights, *(scale for _, scale in pairs.values())), exact

    def run_in_bits(self, x: Tensor, *tensors: Tensor) -> Tensor:
        count = len(tensors) - (len(self.scales) if self.bits != 16 else 0)
        return self.run(x, *tensors[:count], **dict(zip(self.scales.values(), tensors[count:], strict=False)))

    def _beside_floats(self) -> Contenders:
        x, bytes_each = self.inputs(), DTYPES[self.dtype].itemsize
        ours = copies(partial(self.adapter, x), bytes_each * self.multiply_adds)

        def for_torch() -> Weights:
            weights = self.adapter(x)
            return tuple(transposed(w) if i in self.factors else w for i, w in enumerate(weights))

        def error() -> float:
            exact = self.run(x.double(), *(t.double() for t in ours[0]), served=reference)
            return float((self.run(x, *ours[0]).double() - exact).norm() / exact.norm())

        calls = {
            **baselines(x, self.shapes, self.cost_ratio, self.layer),
            "masked in torch": turns(partial(self.in_torch, x), copies(for_torch)),
            "rana": turns(partial(self.run, x), ours),
        }
        if self.in_parts:
            calls["parts"] = turns(partial(self.in_parts, x), far(ours))
        touched = bytes_each * self.values_read(x, ours[0])
        return Contenders(calls, touched, 2 * self.M * self.multiply_adds, error)
