"""The phase `expand`: the kept rows of a weight times their h, for one token and for several."""

import triton
import triton.language as tl

from rana_kernels.backends.triton.dots import dot, dot_exact, dot_in_two, rounded
from rana_kernels.backends.triton.phases import keeps
from rana_kernels.backends.triton.weights import RUN, by_runs, columns, elements, floats, steps


@triton.jit
def expand(
    h, rows, threshold, norms, sums, kept_r, kept_h, M, R, N, stride_h,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Compute sums [SHARES, M, N]: for each share of the rows, the sum of the kept rows times their h [M, R].

    A share is every SHARES-th row. Ranks are sorted by energy, so shares of consecutive rows would keep
    very different numbers of rows.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    m = tl.arange(0, M_PAD)
    for item in range(tl.program_id(0), tiles * SHARES, tl.num_programs(0)):
        share = item // tiles
        first = (item % tiles) * BLOCK_N
        out = sums + share * M * N
        if M_PAD == 1:
            low, high = _expand_one(
                h, rows, threshold, norms,
                kept_r + tl.program_id(0) * CHUNK, kept_h + tl.program_id(0) * CHUNK,
                first, share, R, N, PER_ROW, SHARES, BLOCK_R, BLOCK_N, CHUNK, THREADS,
            )  # fmt: skip
            for half in tl.static_range(rows.halves):
                n = columns(rows, first, N, half, BLOCK_N)
                total = tl.reshape(low if half == 0 else high, n.shape)
                tl.store(out + n, total, mask=n < N)
        elif rows.scale is None:
            n = first + tl.arange(0, BLOCK_N)
            total = _expand_many(
                h, rows, threshold, norms, first, m, share, M, R, stride_h,
                PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            tl.store(out + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])
        else:
            low, high = _expand_many_quantized(
                h, rows, threshold, norms, first, m, share, M, R, N, stride_h,
                PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            for half in tl.static_range(rows.halves):
                n = columns(rows, first, N, half, BLOCK_N)
                n = tl.reshape(n, [BLOCK_N // RUN, 1, RUN // rows.halves])
                mask = (m < M)[None, :, None] & (n < N)
                tl.store(out + m[None, :, None] * N + n, low if half == 0 else high, mask=mask)


@triton.jit
def _expand_one(
    h, rows, threshold, norms, kept_r, kept_h, first, share, R, N,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Handle one token: list the kept rows of a chunk in order, then stream only these rows.

    Return the sums of both halves of the elements; where an element has one, the second is not used.
    """
    COVERED: tl.constexpr = rows.vector * rows.halves
    # the number of rows that the program covers when each thread loads 16 bytes
    LANES: tl.constexpr = min((THREADS * COVERED + BLOCK_N - 1) // BLOCK_N, BLOCK_R)
    low = tl.zeros([LANES, BLOCK_N // rows.halves], tl.float32)
    high = low
    for first_r in range(share, R, SHARES * CHUNK):
        r = first_r + SHARES * tl.arange(0, CHUNK)
        value = tl.load(h + r, mask=r < R, other=0, cache_modifier=".cg").to(tl.float32)
        keep = (r < R) & keeps(value, r, threshold, norms, R, PER_ROW)
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
        kept = tl.sum(keep.to(tl.int32), 0)
        tl.debug_barrier()  # every thread has read the list of the previous chunk
        tl.store(kept_r + place, r, mask=keep)
        tl.store(kept_h + place, value, mask=keep)
        tl.debug_barrier()
        for first_kept in range(0, kept, BLOCK_R):
            i = first_kept + tl.arange(0, BLOCK_R)
            row = tl.load(kept_r + i, mask=i < kept, other=0)
            z = tl.load(kept_h + i, mask=i < kept, other=0)[:, None]
            w = elements(rows, row, i < kept, first, BLOCK_N)
            if rows.scale is not None:
                z *= tl.trans(steps(rows, row, i < kept, first, N, BLOCK_N, COVERED))
            low += _weighed(z, floats(w, 0), rows.vector, LANES)
            if rows.halves == 2:
                high += _weighed(z, floats(w, 1), rows.vector, LANES)
    return tl.sum(low, 0), tl.sum(high, 0)


@triton.jit
def _weighed(z, w, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Return z w, summed to LANES rows: z has a column for all of w, or one for each of its vectors.

    The same threads load every LANES-th row, so the sum of these rows needs no other threads.
    """
    vectors = tl.reshape(w, [w.shape[0], w.shape[1] // VECTOR, VECTOR])
    products = tl.reshape(z[:, :, None] * vectors, [w.shape[0] // LANES, LANES, w.shape[1]])
    return tl.sum(products, 0)


@triton.jit
def _expand_many(
    h, rows, threshold, norms, first, m, share, M, R, stride_h,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Handle several tokens: go through blocks of rows at fixed places, and skip rows that no token keeps.

    The kept rows are not compacted: one token's mask would then change the grouping of another token's sum,
    and thus its last bits.
    """
    total = tl.zeros([M_PAD, BLOCK_N], tl.float32)
    for first_r in range(share, R, SHARES * BLOCK_R):
        r = first_r + SHARES * tl.arange(0, BLOCK_R)
        z, wanted, some = _masked(h, threshold, norms, r, m, M, R, stride_h, PER_ROW)
        if some:
            w = elements(rows, r, wanted, first, BLOCK_N)
            total = dot_exact(z, w, total) if M_PAD <= 16 else dot(rounded(z, w.dtype), w, total)
    return total


@triton.jit
def _expand_many_quantized(
    h, rows, threshold, norms, first, m, share, M, R, N, stride_h,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Do the same for quantised rows. Each run of columns multiplies a z that has the scales of the run.

    Return the sums of both halves of the elements; where an element has one, the second is not used.
    """
    RUNS: tl.constexpr = BLOCK_N // RUN
    low = tl.zeros([RUNS, M_PAD, RUN // rows.halves], tl.float32)
    high = low
    for first_r in range(share, R, SHARES * BLOCK_R):
        r = first_r + SHARES * tl.arange(0, BLOCK_R)
        z, wanted, some = _masked(h, threshold, norms, r, m, M, R, stride_h, PER_ROW)
        if some:
            w = elements(rows, r, wanted, first, BLOCK_N)
            scaled = z[None, :, :] * steps(rows, r, wanted, first, N, BLOCK_N, RUN)[:, None, :]
            low = dot_in_two(scaled, by_runs(floats(w, 0), RUNS), low)
            if rows.halves == 2:
                high = dot_in_two(scaled, by_runs(floats(w, 1), RUNS), high)
    return low, high


@triton.jit
def _masked(h, threshold, norms, r, m, M, R, stride_h, PER_ROW: tl.constexpr):
    """Return the masked h of some rows, which of the rows a token keeps, and whether there is one."""
    here = (m < M)[:, None] & (r < R)[None, :]
    value = tl.load(h + m[:, None] * stride_h + r[None, :], mask=here, other=0, cache_modifier=".cg")
    value = value.to(tl.float32)
    keep = here & keeps(value, r, threshold, norms, R, PER_ROW)
    wanted = tl.max(keep.to(tl.int32), 0) > 0
    return tl.where(keep, value, 0), wanted, tl.max(wanted.to(tl.int32), 0) > 0
