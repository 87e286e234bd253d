"""The phase `project`: x times the rows of a weight, for one token and for several."""

import triton
import triton.language as tl

from rana_kernels.backends.triton.dots import dot, dot_whole, rounded
from rana_kernels.backends.triton.weights import RUN, by_runs, columns, elements, floats, steps


@triton.jit
def project(
    x, B, bias, h, M, K, R, M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Compute h [M, R] = x [M, K] Bᵀ + bias. Each program streams blocks of BLOCK_R rows of B once."""
    m = tl.arange(0, M_PAD)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        if M_PAD == 1:
            sums = _project_one(x, B, r, K, R, BLOCK_R, BLOCK_K)[:, None]
        elif B.scale is None:
            sums = _project_many(x, B, r, m, M, K, R, M_PAD, BLOCK_R, BLOCK_K)
        else:
            sums = _project_many_quantized(x, B, r, m, M, K, R, M_PAD, BLOCK_R, BLOCK_K)
        if bias is not None:
            sums += tl.load(bias + r, mask=r < R, other=0).to(tl.float32)[:, None]
        tl.store(
            h + m[None, :] * R + r[:, None],
            rounded(sums, h.dtype.element_ty),
            mask=(m < M)[None, :] & (r < R)[:, None],
        )


@triton.jit
def _project_one(x, B, r, K, R, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Handle one token: add up what one thread loads at a time, which needs no other thread."""
    COVERED: tl.constexpr = B.vector * B.halves
    VECTORS: tl.constexpr = BLOCK_K // COVERED
    sums = tl.zeros([BLOCK_R, VECTORS], tl.float32)
    for first in range(0, K, BLOCK_K):
        b = elements(B, r, r < R, first, BLOCK_K)
        part = tl.zeros([BLOCK_R, VECTORS], tl.float32)
        for half in tl.static_range(B.halves):
            k = columns(B, first, K, half, BLOCK_K)
            token = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
            vectors = tl.reshape(floats(b, half), [BLOCK_R, VECTORS, B.vector])
            part += tl.sum(vectors * token[None, :, :], 2)
        if B.scale is not None:
            part *= tl.trans(steps(B, r, r < R, first, K, BLOCK_K, COVERED))
        sums += part
    return tl.sum(sums, 1)


@triton.jit
def _project_many(
    x, B, r, m, M, K, R, M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Handle several tokens and float weights."""
    sums = tl.zeros([BLOCK_R, M_PAD], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        b = elements(B, r, r < R, first, BLOCK_K)
        tokens = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0)
        sums = dot(b, tokens, sums)
    return sums


@triton.jit
def _project_many_quantized(
    x, B, r, m, M, K, R, M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Handle several tokens and quantised weights: the product of a run of columns gets its scale."""
    RUNS: tl.constexpr = BLOCK_K // RUN
    sums = tl.zeros([RUNS, BLOCK_R, M_PAD], tl.float32)
    for first in range(0, K, BLOCK_K):
        b = elements(B, r, r < R, first, BLOCK_K)
        part = tl.zeros([RUNS, BLOCK_R, M_PAD], tl.float32)
        for half in tl.static_range(B.halves):
            k = columns(B, first, K, half, BLOCK_K)[:, :, None]
            tokens = tl.load(x + m[None, None, :] * K + k, mask=(m < M)[None, None, :] & (k < K), other=0)
            tokens = tl.reshape(tokens, [RUNS, RUN // B.halves, M_PAD])
            part = dot_whole(by_runs(floats(b, half), RUNS), tokens, part)
        sums += part * steps(B, r, r < R, first, K, BLOCK_K, RUN)[:, :, None]
    return tl.sum(sums, 0)
