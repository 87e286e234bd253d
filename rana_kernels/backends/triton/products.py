"""Tiled products for many tokens. The masks are applied where a tile is loaded or stored.

product   y = m_out ⊙ ((m_in ⊙ a) b + bias); both masks and the bias are optional
neurons   g = m_out ⊙ (act((m_in ⊙ z) gate_rows + bias) · ((m_in ⊙ z) up_rows + bias)); m_in is optional
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_kernels.backends.triton.configurations import Prefill
from rana_kernels.backends.triton.dots import dot, rounded
from rana_kernels.backends.triton.launch import on
from rana_kernels.backends.triton.phases import activate, keeps


@triton.jit
def product_kernel(
    a, b, y, in_threshold, in_norms, bias, out_threshold, M, K, N, stride_a, stride_bk, stride_bn,
    IN_PER_ROW: tl.constexpr, OUT_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n = _place(M, N, BLOCK_M, BLOCK_N)
    total = _tile(
        a, b, in_threshold, in_norms, m, n, M, K, N, stride_a, stride_bk, stride_bn,
        IN_PER_ROW, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    total = _add_bias(total, bias, n, N)
    if out_threshold is not None:
        total = tl.where(keeps(total, n, out_threshold, None, N, OUT_PER_ROW), total, 0)
    _store(y, total, m, n, M, N)


@triton.jit
def neurons_kernel(
    z_up, z_gate, in_threshold, in_norms, up_rows, gate_rows, up_bias, gate_bias, threshold, norms, g,
    M, R_UP, R_GATE, N, stride_z, stride_up, stride_gate,
    IN_PER_ROW: tl.constexpr, PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n = _place(M, N, BLOCK_M, BLOCK_N)
    up = _tile(
        z_up, up_rows, in_threshold, in_norms, m, n, M, R_UP, N, stride_z, stride_up, 1,
        IN_PER_ROW, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = _add_bias(up, up_bias, n, N)
    if gate_rows is None:
        value = activate(up, ACTIVATION)
    else:
        gate = _tile(
            z_gate, gate_rows, in_threshold, in_norms, m, n, M, R_GATE, N, stride_z, stride_gate, 1,
            IN_PER_ROW, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        value = activate(_add_bias(gate, gate_bias, n, N), ACTIVATION) * up
    _store(g, tl.where(keeps(value, n, threshold, norms, N, PER_ROW), value, 0), m, n, M, N)


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the rows and columns of this program's tile. Neighbours read the same columns of the weights."""
    tile = tl.program_id(0)
    m = (tile % tl.cdiv(M, BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tl.cdiv(M, BLOCK_M)) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit
def _tile(
    a, b, threshold, norms, m, n, M, K, N, stride_a, stride_bk, stride_bn,
    PER_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a float32 tile of (m ⊙ a) b, for a [M, K] and b [K, N]."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = tl.load(
            a + m[:, None].to(tl.int64) * stride_a + k[None, :],
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0,
        )
        if threshold is not None:
            left = tl.where(keeps(left.to(tl.float32), k, threshold, norms, K, PER_ROW), left, 0)
        right = tl.load(
            b + k[:, None].to(tl.int64) * stride_bk + n[None, :].to(tl.int64) * stride_bn,
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0,
        )
        total = dot(left, right, total)
    return total


@triton.jit
def _add_bias(total, bias, n, N):
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    return total


@triton.jit
def _store(y, value, m, n, M, N):
    tl.store(
        y + m[:, None].to(tl.int64) * N + n[None, :],
        rounded(value, y.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


def project(x: Tensor, B: Tensor, threshold: Tensor, config: Prefill) -> Tensor:
    """Compute x [M, K] · B [R, K] -> m ⊙ (x Bᵀ) in x's dtype. The mask is decided in float32."""
    z = x.new_empty(len(x), len(B))
    _launch(x, B, z, None, None, None, threshold, (1, B.stride(0)), config)
    return z


def expand(z: Tensor, rows: Tensor, bias: Tensor | None, config: Prefill) -> Tensor:
    """Compute z [M, R], masked already · rows [R, N], in any layout -> z rows + bias.

    With `config.cublas`, this is a product of torch like any other, and `torch.backends.cuda.matmul` decides
    its precision: TF32 if it is switched on, and partial sums in 16 bits unless they are switched off.
    """
    if config.cublas:
        return torch.mm(z, rows) if bias is None else torch.addmm(bias, z, rows)
    y = z.new_empty(len(z), rows.shape[1])
    _launch(z, rows, y, None, None, bias, None, rows.stride(), config)
    return y


def masked_product(
    h: Tensor, rows: Tensor, threshold: Tensor, norms: Tensor | None, bias: Tensor | None, config: Prefill
) -> Tensor:
    """Compute h [M, R] · rows [R, N] -> (m ⊙ h) rows + bias."""
    y = h.new_empty(len(h), rows.shape[1])
    _launch(h, rows, y, threshold, norms, bias, None, (rows.stride(0), 1), config)
    return y


def neurons(
    z_up: Tensor, z_gate: Tensor, in_threshold: Tensor | None, in_norms: Tensor | None,
    up_rows: Tensor, gate_rows: Tensor | None, up_bias: Tensor | None, gate_bias: Tensor | None,
    threshold: Tensor, norms: Tensor, activation: str, config: Prefill,
) -> Tensor:  # fmt: skip
    """Compute z_up [M, R_up], z_gate [M, R_gate] · rows [R, I] -> the masked neurons [M, I], in z's dtype.

    With an `in_threshold`, one mask is applied to z_up and z_gate, which then are the same.
    """
    M, N = len(z_up), up_rows.shape[1]
    g = z_up.new_empty(M, N)
    # a tile holds two sums, so it has half the columns
    BLOCK_N = max(16, config.block_n // 2)
    with on(g.device):
        neurons_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(N, BLOCK_N),)](
            z_up, z_gate, in_threshold, in_norms, up_rows, gate_rows, up_bias, gate_bias, threshold, norms, g,
            M, up_rows.shape[0], 0 if gate_rows is None else gate_rows.shape[0], N,
            z_up.stride(0), up_rows.stride(0), 0 if gate_rows is None else gate_rows.stride(0),
            in_threshold is not None and in_threshold.dim() == 1, threshold.dim() == 1, activation,
            config.block_m, BLOCK_N, config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return g


def _launch(
    a: Tensor, b: Tensor, y: Tensor, in_threshold: Tensor | None, in_norms: Tensor | None,
    bias: Tensor | None, out_threshold: Tensor | None, strides: tuple[int, ...], config: Prefill,
) -> None:  # fmt: skip
    (M, N), K = y.shape, a.shape[1]
    with on(y.device):
        product_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)](
            a, b, y, in_threshold, in_norms, bias, out_threshold, M, K, N, a.stride(0), *strides,
            in_threshold is not None and in_threshold.dim() == 1,
            out_threshold is not None and out_threshold.dim() == 1,
            config.block_m, config.block_n, config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
