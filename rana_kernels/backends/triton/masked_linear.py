"""`masked_linear` in Triton: one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_kernels.backends.triton import configurations, products
from rana_kernels.backends.triton.expand import expand
from rana_kernels.backends.triton.launch import list_size, packed, run, scratch, seated, tokens_of
from rana_kernels.backends.triton.phases import finish, grid_barrier
from rana_kernels.backends.triton.weights import Weight, readable
from rana_kernels.ops import checks
from rana_kernels.ops.quantized import columns_of


@triton.jit
def kernel(
    h, rows, threshold, norms, bias, y, sums, kept_r, kept_h, M, R, N, state,
    PER_ROW: tl.constexpr, M_PAD: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Run all phases (PHASE 0), or only phase number PHASE."""
    if PHASE == 0 or PHASE == 1:
        expand(
            h, rows, threshold, norms, sums, kept_r, kept_h, M, R, N, R,
            PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_N, CHUNK, THREADS,
        )  # fmt: skip
    if PHASE == 0:
        grid_barrier(state)
    if PHASE == 0 or PHASE == 2:
        finish(sums, bias, y, M, N, SHARES)


def masked_linear(
    h: Tensor,
    rows: Tensor,
    threshold: Tensor,
    norms: Tensor | None = None,
    bias: Tensor | None = None,
    rows_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_linear(h, rows, threshold, norms, bias, rows_scale)
    tokens = tokens_of("masked_linear", "h", h)
    N = columns_of(rows)
    weight = readable(rows, rows_scale, N, len(tokens), h.dtype)
    threshold, norms, bias = threshold.contiguous(), packed(norms), packed(bias)
    if len(tokens) == 0 or N == 0:
        y = h.new_empty(len(tokens), N)
    elif configurations.decodes(len(tokens), tokens.dtype):
        y = _decode(tokens, weight, threshold, norms, bias)
    else:
        config = configurations.prefill("masked_linear", tokens, weight.stored)
        y = products.masked_product(tokens, weight.stored, threshold, norms, bias, config)
    return y.view(*h.shape[:-1], N)


def _decode(h: Tensor, rows: Weight, threshold: Tensor, norms: Tensor | None, bias: Tensor | None) -> Tensor:
    (M, R), N = h.shape, columns_of(rows.stored)
    config = configurations.decode("masked_linear", h, rows.stored)
    cut = config.cut(R, N, rows.bits, h.device)
    programs = seated(config, cut.items, h.device)
    sums, kept_r, kept_h = scratch(h.device, cut.shares * M * N, *[list_size(M, programs)] * 2)
    y = h.new_empty(M, N)
    run(
        kernel, 2, programs, config, h.device,
        h, rows, threshold, norms, bias, y, sums, kept_r.view(torch.int32), kept_h, M, R, N,
        PER_ROW=threshold.dim() == 1, M_PAD=configurations.padded(M), SHARES=cut.shares,
        BLOCK_R=cut.rows, BLOCK_N=cut.columns,
    )  # fmt: skip
    return y
