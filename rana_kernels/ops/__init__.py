"""The ops of `torch.ops.rana`, with the shapes and dtypes of their arguments.

    x [..., K]      input                       rows [R, N]     one contiguous row a rank (or a neuron)
    B [R, K]        x -> h = Bx                 threshold       float32, [] or [R]
    weight [N, K]   x -> y, no mask             norms [R]       float32, the factor of a neuron's score
    h [..., R]      rank values (or neurons)    bias [N]
    y [..., N]      output

Every op follows one mask rule: keep `h_i` unless `|h_i|·norms_i < threshold_i` (RaNA, arXiv 2503.18216,
section 3; `threshold` is the square root of the paper's t for ranks, whose norms are 1). The mask is decided
on the float32 value of `h`. x, B, rows, weight and bias share one dtype (float32, bfloat16 or float16). Sums
are float32, and y is rounded once. With more than 16 tokens the masked `h` may be rounded to that dtype as
well. Weights must be finite, and their rows contiguous.

B, rows and weight may instead be quantised, each for itself: int8, or uint8 with two 4-bit values a byte,
beside a float16 scale (`quantized.py` has the layout). The op then computes what it would compute on
`q · scale`.

The ops are functional, deterministic, differentiable (the mask counts as a constant) and opaque to
torch.compile. `schemas.py` lists them, `reference.py` specifies them in plain PyTorch, and
`rana_kernels.backends` holds the faster implementations.
"""

from torch import Tensor

from rana_kernels.ops import registration
from rana_kernels.ops._ops import ops
from rana_kernels.ops.schemas import SCHEMAS

__all__ = ["SCHEMAS", "linear", "masked_linear", "masked_lowrank_linear", "masked_mlp"]

# The registrations live as long as this object.
_LIBRARY = registration.register()


def masked_linear(
    h: Tensor,
    rows: Tensor,
    threshold: Tensor,
    norms: Tensor | None = None,
    bias: Tensor | None = None,
    rows_scale: Tensor | None = None,
) -> Tensor:
    """Sum the rows whose score reaches the threshold: `y = (m ⊙ h) @ rows + bias`.

    h [..., R] · rows [R, N] · threshold [] or [R] · norms [R] · bias [N]
    rows_scale [R, groups] -> y [..., N]
    """
    return ops.masked_linear.default(h, rows, threshold, norms, bias, rows_scale)


def masked_lowrank_linear(
    x: Tensor,
    B: Tensor,
    rows: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    B_scale: Tensor | None = None,
    rows_scale: Tensor | None = None,
) -> Tensor:
    """Apply a rank adapter: `h = x @ B.T`, then `y = (m ⊙ h) @ rows + bias`.

    x [..., K] · B [R, K] · rows [R, N] · threshold [] or [R] · bias [N]
    B_scale, rows_scale [R, groups] -> y [..., N]
    """
    return ops.masked_lowrank_linear.default(x, B, rows, threshold, bias, B_scale, rows_scale)


def masked_mlp(
    x: Tensor,
    B: Tensor | None,
    up_rows: Tensor,
    gate_rows: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_rows: Tensor,
    down_norms: Tensor,
    down_threshold: Tensor,
    down_bias: Tensor | None,
    activation: str,
    B_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Apply a whole MLP: rank or neuron adapters for up and gate, a neuron adapter for down.

    `g = act(gate(x)) * up(x)`, or `act(up(x))` without a gate; `y = (m ⊙ g) @ down_rows + down_bias`.

    x [..., K] · B [S, K] · up_rows [R_up, I] · gate_rows [R_gate, I] · threshold [S]
    up_bias, gate_bias [I] · down_rows [I, N] · down_norms [I] · down_threshold [] or [I] · down_bias [N]
    activation: silu, gelu, gelu_tanh, relu or relu2 · B_scale, up_scale, gate_scale, down_scale -> y [..., N]

    B stacks the ranks of up over those of gate (S = R_up + R_gate), or both read the same ranks
    (S = R_up = R_gate). The shapes tell which. `norms` is then None.

    Without B, up and gate are neuron adapters with one mask on x: up_rows, gate_rows [K, I] ·
    threshold [] or [K] · norms [K] or None.
    """
    return ops.masked_mlp.default(
        x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias, down_rows, down_norms, down_threshold,
        down_bias, activation, B_scale, up_scale, gate_scale, down_scale,
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    """Apply a dense layer, `y = x @ weight.T + bias`. For a few tokens the op reads weights at memory speed.

    x [..., K] · weight [N, K] · bias [N] · weight_scale [N, groups] -> y [..., N]

    lm_head uses this op, and so do linears that stay dense beside adapters. On CUDA, many tokens go through
    torch's own matrix product.
    """
    return ops.linear.default(x, weight, bias, weight_scale)
