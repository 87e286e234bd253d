"""The ops of `torch.ops.rana`: the only list of them, with their schemas, shapes and gradients.

    x [..., K]      input                       rows [R, N]     one contiguous row a rank (or a neuron)
    B [R, K]        x -> h = Bx                 threshold       float32, [] or [R]
    weight [N, K]   x -> y, nothing masked
    h [..., R]      rank values (or neurons)    scale [R]       float32
    y [..., N]      output                      bias [N]

The mask is one rule everywhere: keep `h_i` unless `|h_i|·scale_i < threshold_i` (RaNA, arXiv
2503.18216, section 3; `threshold` is the square root of the paper's t for ranks, where scale is 1).
It is decided on the float32 value of `h`. x, B, rows, weight and bias share a dtype (float32, bfloat16 or
float16), sums are float32, and y is rounded once; with more than 16 tokens the masked `h` may be rounded
to that dtype as well. Weights must be finite, and their rows contiguous.

The ops are functional, deterministic, differentiable (the mask counts as a constant), and opaque to
torch.compile. Implementations live in `rana_kernels.backends`; the plain PyTorch one is the spec.
"""

import torch
from torch import Tensor

from rana_kernels import checks, gradients
from rana_kernels.backends import reference

SCHEMAS = {
    "masked_linear": "(Tensor h, Tensor rows, Tensor threshold, Tensor? scale=None,"
    " Tensor? bias=None) -> Tensor",
    "masked_lowrank_linear": "(Tensor x, Tensor B, Tensor rows, Tensor threshold,"
    " Tensor? bias=None) -> Tensor",
    "masked_mlp": "(Tensor x, Tensor B, Tensor up_rows, Tensor? gate_rows, Tensor threshold,"
    " Tensor? up_bias, Tensor? gate_bias, Tensor down_rows, Tensor down_scale, Tensor down_threshold,"
    " Tensor? down_bias, str activation) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
}

# where each op's N is: an argument, and the dimension of it
_WIDTH = {
    "masked_linear": ("rows", 1),
    "masked_lowrank_linear": ("rows", 1),
    "masked_mlp": ("down_rows", 1),
    "linear": ("weight", 0),
}

# float32 whatever the dtype of the input: autocast leaves these alone
_FLOAT32_ARGUMENTS = {"threshold", "scale", "down_scale", "down_threshold"}


def masked_linear(
    h: Tensor, rows: Tensor, threshold: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Sum the rows whose score reaches the threshold: `y = (m ⊙ h) @ rows + bias`.

    h [..., R] · rows [R, N] · threshold [] or [R] · scale [R] · bias [N] -> y [..., N]
    """
    return torch.ops.rana.masked_linear.default(h, rows, threshold, scale, bias)


def masked_lowrank_linear(
    x: Tensor, B: Tensor, rows: Tensor, threshold: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A rank adapter: `h = x @ B.T`, then `y = (m ⊙ h) @ rows + bias`.

    x [..., K] · B [R, K] · rows [R, N] · threshold [] or [R] · bias [N] -> y [..., N]
    """
    return torch.ops.rana.masked_lowrank_linear.default(x, B, rows, threshold, bias)


def masked_mlp(
    x: Tensor,
    B: Tensor,
    up_rows: Tensor,
    gate_rows: Tensor | None,
    threshold: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_rows: Tensor,
    down_scale: Tensor,
    down_threshold: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """A whole MLP: rank adapters for up and gate, a neuron adapter for down.

    `g = act(gate(x)) * up(x)`, or `act(up(x))` without a gate; `y = (m ⊙ g) @ down_rows + down_bias`.

    x [..., K] · B [S, K] · up_rows [R_up, I] · gate_rows [R_gate, I] · threshold [S]
    up_bias, gate_bias [I] · down_rows [I, N] · down_scale [I] · down_threshold [] or [I] · down_bias [N]
    activation: silu, gelu, gelu_tanh, relu or relu2 -> y [..., N]

    B stacks the ranks of up over those of gate (S = R_up + R_gate), or both read the same ranks
    (S = R_up = R_gate): the shapes tell.
    """
    return torch.ops.rana.masked_mlp.default(
        x, B, up_rows, gate_rows, threshold, up_bias, gate_bias,
        down_rows, down_scale, down_threshold, down_bias, activation,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense layer, `y = x @ weight.T + bias`: for few tokens at the speed at which weights are read.

    x [..., K] · weight [N, K] · bias [N] -> y [..., N]

    For lm_head, and for linears that stay dense beside adapters. For many tokens CUDA takes torch's product.
    """
    return torch.ops.rana.linear.default(x, weight, bias)


def _fake(name: str):
    check = getattr(checks, name)
    argument, dimension = _WIDTH[name]

    def fake(*args):
        filled = [*args, *[None] * (len(_argument_names(name)) - len(args))]
        check(*filled)
        width = filled[_argument_names(name).index(argument)].shape[dimension]
        return filled[0].new_empty((*filled[0].shape[:-1], width))

    return fake


def _argument_names(name: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.rana, name).default._schema.arguments]


def _autocast(name: str, device: str):
    """Cast the input and the weights to autocast's dtype; thresholds and scales stay as they are."""
    op, key = (
        getattr(torch.ops.rana, name).default,
        getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"),
    )
    names = _argument_names(name)

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype) if isinstance(a, Tensor) and n not in _FLOAT32_ARGUMENTS else a
            for n, a in zip(names, args, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*cast)

    return kernel


def _define() -> torch.library.Library:
    library = torch.library.Library("rana", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rana::{name}", _fake(name), lib=library)
        torch.library.register_autograd(
            f"rana::{name}", getattr(gradients, name), setup_context=gradients.save, lib=library
        )
        library.impl(name, _autocast(name, "cpu"), "AutocastCPU")
        library.impl(name, _autocast(name, "cuda"), "AutocastCUDA")
    return library


# registrations live as long as this object
_LIBRARY = _define()
