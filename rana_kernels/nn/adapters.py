"""The modules that take the place of a model's linear layers. Each holds its weights and calls one op.

    RanaLinear         a rank adapter:   y = A (m ⊙ Bx) + b          (RaNA, arXiv 2503.18216, section 3)
    RanaNeuronLinear   a neuron adapter: y = W (m ⊙ x) + b           (the same, for the down projection)
    RanaReceiver       a linear whose output is computed by a joint RanaLinear

The module of a whole MLP is in `mlp.py`.

Every shape follows from the constructor's sizes, so modules can be built on the meta device and
loaded later. No module branches on device, batch size or phase: the op chooses.

Each adapted linear also has an empty tensor named `weight`. A program that does not know adapters and
loads such a checkpoint into dense layers then stops at a shape mismatch. Without the empty tensor it
would continue with freshly initialised weights.
"""

from collections.abc import Sequence
from threading import get_ident
from typing import TypeVar

import torch
from torch import Tensor, nn

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.ops import reference
from rana_kernels.ops.checks import widen

Module = TypeVar("Module", bound=nn.Module)


class AdapterModule(nn.Module):
    """A module whose thresholds and norms stay float32 under `.to(bfloat16)` and `.half()`.

    Thresholds must be finite and >= 0. Loading a state dict checks this.
    """

    threshold: Tensor

    def register_float32(self, name: str, size: int, device: torch.device | str | None) -> None:
        self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device))

    def _apply(self, fn, recurse=True):
        before = {n: b for n, b in self._buffers.items() if n in ("threshold", "norms") and b is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self.get_buffer(name)
            if now.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(now.device)
        return self

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set one threshold for all rows ([]) or one for each row ([R]).

        Raises ValueError unless every threshold is finite and >= 0.
        """
        new = torch.as_tensor(threshold, dtype=torch.float32)
        _require_threshold(new, type(self).__name__)
        with torch.no_grad():
            self.threshold.copy_(new)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        loaded = state_dict.get(prefix + "threshold")
        if loaded is not None and not loaded.is_meta:
            try:
                _require_threshold(loaded, prefix + "threshold")
            except ValueError as error:
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _require_threshold(threshold: Tensor, name: str) -> None:
    bad = threshold[~(threshold.isfinite() & (threshold >= 0))]
    if bad.numel() > 0:
        raise ValueError(f"{name}: threshold has {bad[0].item()}, wanted finite numbers >= 0")


def check_thresholds(model: nn.Module) -> None:
    """Raise ValueError if any threshold of `model` is negative or not finite.

    Loaders that place tensors themselves need this, because they bypass the check of `load_state_dict`.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule) and "threshold" in module._buffers:
            _require_threshold(module.threshold, name)


def fill_module(module: Module, **tensors: Tensor | None) -> Module:
    """Assign all tensors of an empty module by their names in the state dict, and return the module.

    Nothing is copied. Every adapted linear in the module also gets its empty `weight`. Raises RuntimeError
    for a tensor that is missing, unknown or of another shape.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next((tensor.device for tensor in given.values()), torch.device("cpu"))
    for name, child in module.named_modules():
        if isinstance(child, AdaptedLinear):
            like = given.get(f"{name}.rows".lstrip("."), child.weight)
            given[f"{name}.weight".lstrip(".")] = torch.empty(0, dtype=like.dtype, device=device)
    module.load_state_dict(given, strict=True, assign=True)
    return module


def empty_parameter(*shape: int, device, dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class AdaptedLinear(AdapterModule):
    """The common part of all modules that replace one linear: its sizes, its bias and the empty `weight`."""

    weight: Tensor
    rows: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias_size: int, device, dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.register_parameter(
            "bias", empty_parameter(bias_size, device=device, dtype=dtype) if bias_size else None
        )

    def extra_repr(self) -> str:
        ranks = f", ranks={self.rows.shape[0]}" if hasattr(self, "rows") else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{ranks}"


class Handoff:
    """Carries outputs from the RanaLinear that computed them to the receivers that return them.

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
                "RanaReceiver: called before the linear it was decomposed with, or with another input. That "
                "linear computes all their outputs: call it first, with the same tensor, once for each "
                "call of this one"
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


class RanaLinear(AdaptedLinear):
    """A rank adapter in place of one linear, or of several that read the same input.

    B [R, K] · rows [R, N] (A transposed: one contiguous row a rank) · threshold [R] float32 · bias [N].
    For a joint decomposition, `others` lists the widths of the other outputs, and N is the sum of
    `out_features` and these widths. `forward` then returns the first output and hands over the others.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        *,
        others: tuple[int, ...] = (),
        handoff: Handoff | None = None,
        device=None,
        dtype=None,
    ) -> None:
        width = out_features + sum(others)
        super().__init__(in_features, out_features, width if bias else 0, device, dtype)
        self.widths, self.handoff = (out_features, *others), handoff
        self.B = empty_parameter(rank, in_features, device=device, dtype=dtype)
        self.rows = empty_parameter(rank, width, device=device, dtype=dtype)
        self.register_float32("threshold", rank, device)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.rana.masked_lowrank_linear(x, self.B, self.rows, self.threshold, self.bias)
        return y if self.handoff is None else self.handoff.share(x, y.split(self.widths, dim=-1))

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mask that `forward` applies, [..., R] bool, from the reference implementation."""
        return {"": reference.keep(wide_product(x, self.B), self.threshold)}


class RanaReceiver(AdaptedLinear):
    """A linear whose output is computed by the joint RanaLinear that was called before it."""

    def __init__(
        self, in_features: int, out_features: int, handoff: Handoff, index: int, *, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, 0, device, dtype)
        self.handoff, self.index = handoff, index

    def forward(self, x: Tensor) -> Tensor:
        return self.handoff.take(x, self.index)


def joint_linears(
    in_features: int, out_features: tuple[int, ...], rank: int, bias: bool = False, *, device=None, dtype=None
) -> list[AdaptedLinear]:
    """Build one RanaLinear that computes all of `out_features`, and a receiver for each but the first.

    The model must call the linears that they replace in the same order.
    """
    first, *others = out_features
    place = {"device": device, "dtype": dtype}
    if not others:
        return [RanaLinear(in_features, first, rank, bias, **place)]
    handoff = Handoff()
    owner = RanaLinear(in_features, first, rank, bias, others=tuple(others), handoff=handoff, **place)
    return [owner, *(RanaReceiver(in_features, n, handoff, i, **place) for i, n in enumerate(others))]


class RanaNeuronLinear(AdaptedLinear):
    """A neuron adapter. It skips input i where `|x_i|·norms_i < threshold_i`.

    rows [K, N] (W transposed) · norms [K] = ‖W_:,i‖₂, float32 · threshold [K] float32 · bias [N].
    """

    norms: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.rows = empty_parameter(in_features, out_features, device=device, dtype=dtype)
        self.register_float32("norms", in_features, device)
        self.register_float32("threshold", in_features, device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_linear(x, self.rows, self.threshold, self.norms, self.bias)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mask that `forward` applies, [..., K] bool, from the reference implementation."""
        return {"": reference.keep(widen(x), self.threshold, self.norms)}


def wide_product(x: Tensor, B: Tensor) -> Tensor:
    """Return `x @ B.T` in the dtype in which masks are decided."""
    return widen(x) @ widen(B).T
