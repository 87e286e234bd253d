"""The modules that take the place of a model's linear layers. Each holds its weights and calls one op.

    RanaLinear         a rank adapter:   y = A (m ⊙ Bx) + b          (RaNA, arXiv 2503.18216, section 3)
    RanaNeuronLinear   a neuron adapter: y = W (m ⊙ x) + b           (the same, for the down projection)
    RanaReceiver       a linear whose output is computed by a joint adapter of one of these two kinds

The module of a whole MLP is in `mlp.py`.

Every shape follows from the constructor's sizes, so modules can be built on the meta device and
loaded later. No module branches on device, batch size or phase: the op chooses.

Each adapted linear also has an empty tensor named `weight`. A program that does not know adapters and
loads such a checkpoint into dense layers then stops at a shape mismatch. Without the empty tensor it
would continue with freshly initialised weights.
"""

from collections.abc import Sequence
from threading import get_ident

import torch
from torch import Tensor

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.nn.base import AdaptedLinear, wide_product
from rana_kernels.nn.format import FLOAT, Format
from rana_kernels.ops import reference
from rana_kernels.ops.checks import widen


class Handoff:
    """Carries outputs from the adapter that computed them to the receivers that return them.

    The outputs lie on the input tensor itself, under a name of this handoff and thread. Threads that call
    one model at once, and calls within calls, therefore never meet, and an input that is dropped takes its
    outputs with it. A copy or a pickle of a handoff is a new one. Modules that are copied in one call still
    share one.
    """

    def __init__(self) -> None:
        self.traced: tuple[Tensor, dict[int, Tensor]] | None = None

    def __reduce__(self):
        return Handoff, ()

    def share(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Return the first output for `x`, and hold the others for their receivers."""
        first, *rest = outputs
        held = dict(enumerate(rest))
        if torch.compiler.is_compiling():  # a trace has no attributes of tensors, and no threads
            self.traced = (x, held)
        else:
            setattr(x, self._name(), held)
        return first

    def take(self, x: Tensor, index: int) -> Tensor:
        """Return the output of receiver `index`. Raise RuntimeError if it was not computed for this `x`."""
        if torch.compiler.is_compiling():
            held = self.traced[1] if self.traced is not None and self.traced[0] is x else {}
        else:
            held = getattr(x, self._name(), {})
        if index not in held:
            raise RuntimeError(
                "RanaReceiver: called before the linear that it shares an adapter with, or with another "
                "input. That linear computes all their outputs: call it first, with the same tensor, once "
                "for each call of this one"
            )
        output = held.pop(index)
        if not held:
            self._forget(x)
        return output

    def _forget(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            self.traced = None
        else:
            delattr(x, self._name())

    def _name(self) -> str:
        return f"_rana_{id(self)}_{get_ident()}"


class JointLinear(AdaptedLinear):
    """The common part of adapters that compute one output, or with `others` those of several linears."""

    def __init__(self, in_features, out_features, bias, others, handoff, device, dtype) -> None:
        widths = (out_features, *others)
        super().__init__(in_features, out_features, sum(widths) if bias else 0, device, dtype)
        self.widths, self.handoff = widths, handoff

    def hand_over(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the first output of the input x. Keep the others for their receivers."""
        return y if self.handoff is None else self.handoff.share(x, y.split(self.widths, dim=-1))


class RanaLinear(JointLinear):
    """A rank adapter in place of one linear, or of several that read the same input.

    B [R, K] · rows [R, N] (A transposed: one contiguous row a rank) · threshold [R] float32 · bias [N] ·
    B_scale, rows_scale [R, groups] float16 if `format` is quantised. With 4 bits, `rows` have 8.
    For a joint decomposition, `others` lists the widths of the other outputs, and N is the sum of
    `out_features` and these widths. `forward` then returns the first output and hands over the others.
    """

    B: Tensor
    B_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        *,
        others: tuple[int, ...] = (),
        handoff: Handoff | None = None,
        format: Format = FLOAT,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, others, handoff, device, dtype)
        width = sum(self.widths)
        self.register_matrix("B", rank, in_features, format, device, dtype)
        self.register_matrix("rows", rank, width, format.for_ranks, device, dtype)
        self.register_float32("threshold", rank, device)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.rana.masked_lowrank_linear(
            x, self.B, self.rows, self.threshold, self.bias, self.B_scale, self.rows_scale
        )
        return self.hand_over(x, y)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mask that `forward` applies, [..., R] bool, from the reference implementation."""
        return {"": reference.keep(wide_product(x, self.B, self.B_scale), self.threshold)}


class RanaReceiver(AdaptedLinear):
    """A linear whose output is computed by the joint adapter that was called before it."""

    def __init__(
        self, in_features: int, out_features: int, handoff: Handoff, index: int, *, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, 0, device, dtype)
        self.handoff, self.index = handoff, index

    def forward(self, x: Tensor) -> Tensor:
        return self.handoff.take(x, self.index)


class RanaNeuronLinear(JointLinear):
    """A neuron adapter in place of one linear, or of several that read the same input.

    It skips input i where `|x_i|·norms_i < threshold_i`.
    rows [K, N] (W transposed) · norms [K] = ‖W_:,i‖₂, float32 · threshold [K] float32 · bias [N] ·
    rows_scale [K, groups] float16 if `format` is quantised.
    Joint linears have one mask. Their W are stacked, so the norms are over all outputs, and `others` is as
    in a RanaLinear.
    """

    norms: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        others: tuple[int, ...] = (),
        handoff: Handoff | None = None,
        format: Format = FLOAT,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, others, handoff, device, dtype)
        width = sum(self.widths)
        self.register_matrix("rows", in_features, width, format.for_rows(width), device, dtype)
        self.register_float32("norms", in_features, device)
        self.register_float32("threshold", in_features, device)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.rana.masked_linear(x, self.rows, self.threshold, self.norms, self.bias, self.rows_scale)
        return self.hand_over(x, y)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mask that `forward` applies, [..., K] bool, from the reference implementation."""
        return {"": reference.keep(widen(x), self.threshold, self.norms)}


def joint_linears(
    in_features: int,
    out_features: tuple[int, ...],
    rank: int | None,
    bias: bool = False,
    *,
    format: Format = FLOAT,
    device=None,
    dtype=None,
) -> list[AdaptedLinear]:
    """Build one adapter that computes all of `out_features`, and a receiver for each but the first.

    It is a RanaLinear of so many ranks, or with `rank=None` a RanaNeuronLinear. The model must call the
    linears that they replace in the same order.
    """
    first, *others = out_features
    place = {"device": device, "dtype": dtype}
    handoff = Handoff() if others else None
    how = {"others": tuple(others), "handoff": handoff, "format": format, **place}
    owner: AdaptedLinear
    if rank is None:
        owner = RanaNeuronLinear(in_features, first, bias, **how)
    else:
        owner = RanaLinear(in_features, first, rank, bias, **how)
    if handoff is None:
        return [owner]
    return [owner, *(RanaReceiver(in_features, n, handoff, i, **place) for i, n in enumerate(others))]
