"""`masked_lowrank_linear` in Triton: one launch for decoding, two products for prefill."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_kernels.backends.triton import configurations, products
from rana_kernels.backends.triton.expand import expand
from rana_kernels.backends.triton.launch import (
    list_size,
    packed,
    run,
    scratch,
    seated,
    tokens_of,
    working_dtype,
)
from rana_kernels.backends.triton.phases import finish, grid_barrier
from rana_kernels.backends.triton.project import project
from rana_kernels.backends.triton.weights import Weight, readable
from rana_kernels.ops import checks
from rana_kernels.ops.quantized import columns_of


@triton.jit
def kernel(
    x, B, rows, threshold, bias, y, h, sums, kept_r, kept_h, M, K, R, N, state,
    PER_ROW: tl.constexpr, M_PAD: tl.constexpr, PROJECT_R: tl.constexpr, PROJECT_K: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Run all phases (PHASE 0), or only phase number PHASE."""
    if PHASE == 0 or PHASE == 1:
        project(x, B, None, h, M, K, R, M_PAD, PROJECT_R, PROJECT_K)
    if PHASE == 0:
        grid_barrier(state)
    if PHASE == 0 or PHASE == 2:
        expand(
            h, rows, threshold, None, sums, kept_r, kept_h, M, R, N, R,
            PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_N, CHUNK, THREADS,
        )  # fmt: skip
    if PHASE == 0:
        grid_barrier(state)
    if PHASE == 0 or PHASE == 3:
        finish(sums, bias, y, M, N, SHARES)


def masked_lowrank_linear(
    x: Tensor,
    B: Tensor,
    rows: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    B_scale: Tensor | None = None,
    rows_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_lowrank_linear(x, B, rows, threshold, bias, B_scale, rows_scale)
    tokens, N = tokens_of("masked_lowrank_linear", "x", x), columns_of(rows)
    dtype = working_dtype(tokens, B_scale)
    tokens, bias, threshold = tokens.to(dtype), packed(bias, dtype), threshold.contiguous()
    projecting = readable(B, B_scale, x.shape[-1], len(tokens), dtype)
    expanding = readable(rows, rows_scale, N, len(tokens), dtype)
    if len(tokens) == 0 or N == 0:
        y = tokens.new_empty(len(tokens), N)
    elif configurations.decodes(len(tokens), tokens.dtype):
        y = _decode(tokens, projecting, expanding, threshold, bias)
    else:
        y = _prefill(tokens, projecting.stored, expanding.stored, threshold, bias)
    return y.view(*x.shape[:-1], N).to(x.dtype)


def _decode(x: Tensor, B: Weight, rows: Weight, threshold: Tensor, bias: Tensor | None) -> Tensor:
    (M, K), R, N = x.shape, len(rows.stored), columns_of(rows.stored)
    config = configurations.decode("masked_lowrank_linear", x, B.stored, rows.stored)
    project_r, project_k = config.blocks(K, B.bits)
    cut = config.cut(R, N, rows.bits, x.device)
    programs = seated(config, max(cut.items, triton.cdiv(R, project_r)), x.device)
    lists = [list_size(M, programs)] * 2
    h, sums, kept_r, kept_h = scratch(x.device, M * R, cut.shares * M * N, *lists)
    y = x.new_empty(M, N)
    run(
        kernel, 3, programs, config, x.device,
        x, B, rows, threshold, bias, y, h, sums, kept_r.view(torch.int32), kept_h, M, K, R, N,
        PER_ROW=threshold.dim() == 1, M_PAD=configurations.padded(M),
        PROJECT_R=project_r, PROJECT_K=project_k,
        SHARES=cut.shares, BLOCK_R=cut.rows, BLOCK_N=cut.columns,
    )  # fmt: skip
    return y


def _prefill(x: Tensor, B: Tensor, rows: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
    config = configurations.prefill("masked_lowrank_linear", x, B, rows)
    return products.expand(products.project(x, B, threshold, config), rows, bias, config)
