"""The modules that take the place of a model's linear layers: weights, thresholds, one op call each.

    RanaLinear         a rank adapter:   y = A (m ⊙ Bx) + b          (RaNA, arXiv 2503.18216, section 3)
    RanaNeuronLinear   a neuron adapter: y = W (m ⊙ x) + b           (its form for the down projection)
    RanaReceiver       a linear whose output a jointly decomposed RanaLinear computes
    RanaMLP            two rank adapters and a neuron adapter around an activation, in one op

Every shape follows from the constructor's sizes, so modules can be built on the meta device and
loaded later. Nothing here branches on device, batch size or phase: the op chooses.

Each adapted linear also keeps, under the name `weight`, an empty tensor. A program that knows
nothing of adapters and loads such a checkpoint into dense layers then stops at a shape mismatch,
where it would otherwise go on with freshly initialised weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.ops import reference
from rana_kernels.ops.checks import ACTIVATIONS, wide_dtype
from rana_kernels.ops.mlp import combine, gate_ranks

Module = TypeVar("Module", bound=nn.Module)


class AdapterModule(nn.Module):
    """Thresholds and norms stay float32 under `.to(bfloat16)` and `.half()`, and must be finite."""

    threshold: Tensor

    def _register_float32(self, name: str, size: int, device: torch.device | str | None) -> None:
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
        """Set one threshold for all rows ([]) or one each ([R]).

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

    For loaders that place tensors themselves and so pass by the check of `load_state_dict`.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule) and "threshold" in module._buffers:
            _require_threshold(module.threshold, name)


def fill_module(module: Module, **tensors: Tensor | None) -> Module:
    """Give an empty module all its tensors by their names in the state dict, without a copy, and return it.

    Every adapted linear in it also gets its empty `weight`. Raises RuntimeError for a tensor that is missing,
    unknown or of another shape.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    like = next((t for t in given.values() if t.is_floating_point()), torch.empty(0))
    for name, child in module.named_modules():
        if isinstance(child, AdaptedLinear):
            rows = given.get(f"{name}.rows".lstrip("."), like)
            given[f"{name}.weight".lstrip(".")] = rows.detach().new_empty(0)
    module.load_state_dict(given, strict=True, assign=True)
    return module


def _empty(*shape: int, device, dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class AdaptedLinear(AdapterModule):
    """What stands under a linear's name: its sizes, its bias and the empty `weight`."""

    rows: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: int, device, dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.register_parameter("bias", _empty(bias, device=device, dtype=dtype) if bias else None)

    def extra_repr(self) -> str:
        ranks = f", ranks={self.rows.shape[0]}" if hasattr(self, "rows") else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{ranks}"


class Handoff:
    """Carries outputs from the module that computed them to the modules they belong to.

    Lives within one forward pass: the last receiver empties it. It holds no state worth keeping, so
    a copy or a pickle of it is a new, empty one (shared, as before, by the modules copied together).
    """

    def __init__(self) -> None:
        self.held: tuple[Tensor, dict[int, Tensor]] | None = None

    def __reduce__(self):
        return Handoff, ()

    def share(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Return the first of the outputs for `x`, and hold the others for their receivers."""
        first, *rest = outputs
        self.held = (x, dict(enumerate(rest)))
        return first

    def take(self, x: Tensor, index: int) -> Tensor:
        held = self.held
        if held is None or held[0] is not x or index not in held[1]:
            raise RuntimeError(
                "RanaReceiver: called "
                + ("before" if held is None else "with another input than")
                + " the linear it was decomposed with. That one computes the outputs of both: call it"
                " first, with the same tensor, once for each call of this one"
            )
        output = held[1].pop(index)
        if not held[1]:
            self.held = None
        return output


class RanaLinear(AdaptedLinear):
    """A rank adapter in place of one linear, or of several that read the same input.

    B [R, K] · rows [R, N] (A transposed: one contiguous row a rank) · threshold [R] float32 · bias [N].
    For a joint decomposition `others` lists the widths of the further outputs: N is then the sum of
    `out_features` and these, `forward` returns the first part and hands over the rest.
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
        self.B = _empty(rank, in_features, device=device, dtype=dtype)
        self.rows = _empty(rank, width, device=device, dtype=dtype)
        self._register_float32("threshold", rank, device)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.rana.masked_lowrank_linear(x, self.B, self.rows, self.threshold, self.bias)
        return y if self.handoff is None else self.handoff.share(x, y.split(self.widths, dim=-1))

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """The mask that `forward` applies, [..., R] bool, from the reference implementation."""
        return {"": reference.keep(_wide_product(x, self.B), self.threshold)}


class RanaReceiver(AdaptedLinear):
    """A linear whose output is computed by the RanaLinear it was jointly decomposed with."""

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
    """One RanaLinear that computes all of `out_features`, and a receiver for each one but the first.

    To be put in place in the order in which the model calls them.
    """
    first, *others = out_features
    place = {"device": device, "dtype": dtype}
    if not others:
        return [RanaLinear(in_features, first, rank, bias, **place)]
    handoff = Handoff()
    owner = RanaLinear(in_features, first, rank, bias, others=tuple(others), handoff=handoff, **place)
    return [owner, *(RanaReceiver(in_features, n, handoff, i, **place) for i, n in enumerate(others))]


class RanaNeuronLinear(AdaptedLinear):
    """A neuron adapter: input i is skipped where `|x_i|·norms_i < threshold_i`.

    rows [K, N] (W transposed) · norms [K] = ‖W_:,i‖₂, float32 · threshold [K] float32 · bias [N].
    """

    norms: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.rows = _empty(in_features, out_features, device=device, dtype=dtype)
        self._register_float32("norms", in_features, device)
        self._register_float32("threshold", in_features, device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_linear(x, self.rows, self.threshold, self.norms, self.bias)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """The mask that `forward` applies, [..., K] bool, from the reference implementation."""
        return {"": reference.keep(x.to(wide_dtype(x.dtype)), self.threshold, self.norms)}


class _Rows(AdaptedLinear):
    """The part of a RanaMLP that stands under a linear's own name.

    The MLP calls it to get its tensors, and never reads them past it: hooks that bring weights to
    the device when a module is called (offloading, sharding) then work as for any other layer.
    """

    def __init__(self, in_features, out_features, rank, bias, device, dtype) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.rows = _empty(rank, out_features, device=device, dtype=dtype)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.rows, self.bias


class _NeuronRows(AdaptedLinear):
    """The same for the down projection: a row a neuron, with its norms and threshold."""

    norms: Tensor

    def __init__(self, in_features, out_features, bias, device, dtype) -> None:
        super().__init__(in_features, out_features, out_features if bias else 0, device, dtype)
        self.rows = _empty(in_features, out_features, device=device, dtype=dtype)
        self._register_float32("norms", in_features, device)
        self._register_float32("threshold", in_features, device)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.rows, self.norms, self.threshold, self.bias


class RanaMLP(AdapterModule):
    """A whole MLP in one op: rank adapters for up and gate, a neuron adapter for down.

    B [S, K] and threshold [S] stack the ranks of up over those of gate, or, when `joint`, both read
    the same S ranks. The children keep the names that the linears had (`names`: up, gate, down) and
    hold `rows`, `bias` and, for down, `norms` and `threshold`. `gate_rank=None`: an ungated MLP. The
    same name for up and gate: one linear that computed both, gate's outputs first; `joint`, then.
    Raises ValueError for an unknown activation, or ranks that differ although they are shared.
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        out_features: int,
        up_rank: int,
        gate_rank: int | None,
        activation: str,
        *,
        joint: bool = False,
        bias: tuple[bool, bool, bool] = (False, False, False),
        names: tuple[str, str, str] = ("up_proj", "gate_proj", "down_proj"),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"RanaMLP: activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if joint and up_rank != gate_rank:
            raise ValueError(f"RanaMLP: joint ranks are {up_rank} and {gate_rank}, wanted the same number")
        self.activation, self.names = activation, names
        self.gate_rank, packed = gate_rank, gate_rank is not None and names[0] == names[1]
        place = {"device": device, "dtype": dtype}
        stacked = up_rank if joint else up_rank + (gate_rank or 0)
        self.B = _empty(stacked, in_features, **place)
        self._register_float32("threshold", stacked, device)
        up, gate, down = names
        self.add_module(up, _Rows(in_features, neurons * (1 + packed), up_rank, bias[0], **place))
        if gate_rank is not None and not packed:
            self.add_module(gate, _Rows(in_features, neurons, gate_rank, bias[1], **place))
        self.add_module(down, _NeuronRows(neurons, out_features, bias[2], **place))

    def op_arguments(self) -> tuple:
        """Return B and the tensors that follow it in the signature of `masked_mlp`."""
        up, gate, down = self.names
        up_rows, up_bias = getattr(self, up)()
        if self.gate_rank is None:
            gate_rows = gate_bias = None
        elif gate == up:
            gate_rows, up_rows = up_rows.chunk(2, dim=1)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        else:
            gate_rows, gate_bias = getattr(self, gate)()
        down_rows, norms, down_threshold, down_bias = getattr(self, down)()
        up_and_gate = (self.B, up_rows, gate_rows, self.threshold, up_bias, gate_bias)
        return *up_and_gate, down_rows, norms, down_threshold, down_bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rana.masked_mlp(x, *self.op_arguments(), self.activation)

    def masks(self, x: Tensor) -> dict[str, Tensor]:
        """The masks that `forward` applies, by child: [..., R] for up and gate, [..., I] for down."""
        B, up_rows, gate_rows, threshold, up_bias, gate_bias, _, norms, down_threshold, _ = (
            self.op_arguments()
        )
        wide = wide_dtype(x.dtype)
        h = _wide_product(x, B)
        mask = reference.keep(h, threshold)
        z = torch.where(mask, h, 0)

        def expand(part: slice, rows: Tensor, bias: Tensor | None) -> Tensor:
            y = z[..., part] @ rows.to(wide)
            return y if bias is None else y + bias.to(wide)

        first = slice(0, up_rows.shape[0])
        masks, up, gate = {self.names[0]: mask[..., first]}, expand(first, up_rows, up_bias), None
        if gate_rows is not None:
            last = gate_ranks(B.shape[0], gate_rows.shape[0])
            masks[self.names[1]] = mask[..., last]
            gate = expand(last, gate_rows, gate_bias)
        g = combine(up, gate, partial(reference.activate, activation=self.activation))
        return {**masks, self.names[2]: reference.keep(g, down_threshold, norms)}


def _wide_product(x: Tensor, B: Tensor) -> Tensor:
    wide = wide_dtype(x.dtype)
    return x.to(wide) @ B.to(wide).T
