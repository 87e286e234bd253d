"""The phases that the decode kernels are made of, and the barrier between them.

A decode kernel is one launch of a grid that stays resident. Its programs work through a phase, wait
for one another, and go on to the next: what one phase leaves in scratch memory the next one reads.

    project   h = x Bᵀ                                        scratch h [M, R], or y
    expand    the kept rows times their h, in tiles of        scratch sums [SHARES, M, N]
              columns × interleaved shares of the rows
    finish    sums over the shares, in order; bias; dtype     y [M, N]

All sums are float32, and how they are grouped depends on the shapes and on the token's own mask
alone, so that a token's result has the same bits whatever the others contain.
"""

import triton
import triton.language as tl

from rana_kernels.backends.triton import interpreted

# the name of a constant that kernels may read
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def grid_barrier(state):
    """Wait until every program of the grid is here. `state`: int32 [2], [arrived, generation].

    The last program to arrive clears the count for the next barrier and opens the gate by counting
    up the generation, so the state never needs filling. Needs a grid that is resident as a whole
    (a cooperative launch). Every atomic orders the memory of its whole program: the barriers before
    and after it pass that on to, and from, the program's other threads.
    """
    tl.debug_barrier()
    generation = tl.atomic_add(state + 1, 0, sem="acquire", scope="gpu")
    arrived = tl.atomic_add(state, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        tl.atomic_xchg(state, 0, sem="relaxed", scope="gpu")
        tl.atomic_add(state + 1, 1, sem="release", scope="gpu")
    else:
        while tl.atomic_add(state + 1, 0, sem="acquire", scope="gpu") == generation:
            pass
    tl.debug_barrier()


@triton.jit
def project(
    x, B, bias, h, M, K, R, stride_B, M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """h [M, R] = x [M, K] Bᵀ + bias. Each program takes blocks of BLOCK_R rows of B and streams them once."""
    m = tl.arange(0, M_PAD)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        row = B + r[:, None].to(tl.int64) * stride_B
        if M_PAD == 1:
            VECTOR: tl.constexpr = 128 // B.dtype.element_ty.primitive_bitwidth
            parts = tl.zeros([BLOCK_R, BLOCK_K // VECTOR], tl.float32)
            for first_k in range(0, K, BLOCK_K):
                k = first_k + tl.arange(0, BLOCK_K)
                b = _stream(row + k[None, :], (r < R)[:, None] & (k < K)[None, :])
                token = tl.load(x + k, mask=k < K, other=0)
                products = b.to(tl.float32) * token.to(tl.float32)[None, :]
                # the elements of one load are one thread's: adding them up needs no other thread
                parts += tl.sum(tl.reshape(products, [BLOCK_R, BLOCK_K // VECTOR, VECTOR]), 2)
            sums = tl.sum(parts, 1)[:, None]
        else:
            sums = tl.zeros([BLOCK_R, M_PAD], tl.float32)
            for first_k in range(0, K, BLOCK_K):
                k = first_k + tl.arange(0, BLOCK_K)
                b = _stream(row + k[None, :], (r < R)[:, None] & (k < K)[None, :])
                tokens = tl.load(
                    x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0
                )
                sums = dot(b, tokens, sums)
        if bias is not None:
            sums += tl.load(bias + r, mask=r < R, other=0).to(tl.float32)[:, None]
        tl.store(
            h + m[None, :] * R + r[:, None],
            rounded(sums, h.dtype.element_ty),
            mask=(m < M)[None, :] & (r < R)[:, None],
        )


@triton.jit
def expand(
    h, rows, threshold, norms, sums, kept_r, kept_h, M, R, N, stride_h, stride_rows,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """sums [SHARES, M, N]: for each share of the rows, the kept ones times their h [M, R].

    A share is every SHARES-th row. Ranks are sorted by energy, so consecutive shares would differ in
    how many rows they keep, by far.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    for item in range(tl.program_id(0), tiles * SHARES, tl.num_programs(0)):
        share = item // tiles
        n = (item % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.arange(0, M_PAD)
        out = sums + share * M * N
        if M_PAD == 1:
            total = _expand_one(
                h, rows, threshold, norms,
                kept_r + tl.program_id(0) * CHUNK, kept_h + tl.program_id(0) * CHUNK,
                n, share, R, N, stride_rows, PER_ROW, SHARES, BLOCK_R, BLOCK_N, CHUNK, THREADS,
            )  # fmt: skip
            tl.store(out + n, total, mask=n < N)
        else:
            total = _expand_many(
                h, rows, threshold, norms, n, m, share, M, R, N, stride_h, stride_rows,
                PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            tl.store(out + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _expand_one(
    h, rows, threshold, norms, kept_r, kept_h, n, share, R, N, stride_rows,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One token: list the kept rows of a chunk in their order, then stream only those."""
    # rows that the program covers when each thread loads 16 bytes
    LANES: tl.constexpr = (THREADS * 128 // rows.dtype.element_ty.primitive_bitwidth + BLOCK_N - 1) // BLOCK_N
    sums = tl.zeros([LANES, BLOCK_N], tl.float32)
    for first in range(share, R, SHARES * CHUNK):
        r = first + SHARES * tl.arange(0, CHUNK)
        value = tl.load(h + r, mask=r < R, other=0, cache_modifier=".cg").to(tl.float32)
        keep = (r < R) & keeps(value, r, threshold, norms, R, PER_ROW)
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
        kept = tl.sum(keep.to(tl.int32), 0)
        tl.debug_barrier()  # the list of the chunk before has been read
        tl.store(kept_r + place, r, mask=keep)
        tl.store(kept_h + place, value, mask=keep)
        tl.debug_barrier()
        for first_kept in range(0, kept, BLOCK_R):
            i = first_kept + tl.arange(0, BLOCK_R)
            row = tl.load(kept_r + i, mask=i < kept, other=0)
            z = tl.load(kept_h + i, mask=i < kept, other=0)
            pointers = rows + row[:, None].to(tl.int64) * stride_rows + n[None, :]
            w = _stream(pointers, (i < kept)[:, None] & (n < N)[None, :])
            products = z[:, None] * w.to(tl.float32)
            # every LANES-th row is loaded by the same threads: adding those up needs no others
            sums += tl.sum(tl.reshape(products, [BLOCK_R // LANES, LANES, BLOCK_N]), 0)
    return tl.sum(sums, 0)


@triton.jit
def _expand_many(
    h, rows, threshold, norms, n, m, share, M, R, N, stride_h, stride_rows,
    PER_ROW: tl.constexpr, SHARES: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Several tokens: blocks of rows at fixed places, of which those that no token keeps are not read.

    Compacting the union of the masks would let one token's mask decide with which other products a
    second token's are added up, and so its last bits.
    """
    total = tl.zeros([M_PAD, BLOCK_N], tl.float32)
    for first in range(share, R, SHARES * BLOCK_R):
        r = first + SHARES * tl.arange(0, BLOCK_R)
        here = (m < M)[:, None] & (r < R)[None, :]
        value = tl.load(h + m[:, None] * stride_h + r[None, :], mask=here, other=0, cache_modifier=".cg").to(
            tl.float32
        )
        keep = here & keeps(value, r, threshold, norms, R, PER_ROW)
        wanted = tl.max(keep.to(tl.int32), 0) > 0
        if tl.max(wanted.to(tl.int32), 0) > 0:
            pointers = rows + r[:, None].to(tl.int64) * stride_rows + n[None, :]
            w = _stream(pointers, wanted[:, None] & (n < N)[None, :])
            z = tl.where(keep, value, 0)
            total = dot_exact(z, w, total) if M_PAD <= 16 else dot(rounded(z, w.dtype), w, total)
    return total


@triton.jit
def finish(sums, bias, y, M, N, SHARES: tl.constexpr, BLOCK: tl.constexpr = 128):
    """y [M, N] = the shares' sums [SHARES, M, N], added in order, plus the bias."""
    for first in range(tl.program_id(0) * BLOCK, M * N, tl.num_programs(0) * BLOCK):
        e = first + tl.arange(0, BLOCK)
        total = _add_shares(sums, bias, e, M, N, SHARES)
        tl.store(y + e, rounded(total, y.dtype.element_ty), mask=e < M * N)


@triton.jit
def finish_neurons(
    up_sums, gate_sums, up_bias, gate_bias, g, M, N,
    SHARES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr = 128,
):  # fmt: skip
    """g [M, N] float32 = act(gate) · up, or act(up) where there is no gate."""
    for first in range(tl.program_id(0) * BLOCK, M * N, tl.num_programs(0) * BLOCK):
        e = first + tl.arange(0, BLOCK)
        up = _add_shares(up_sums, up_bias, e, M, N, SHARES)
        if gate_sums is None:
            value = activate(up, ACTIVATION)
        else:
            value = activate(_add_shares(gate_sums, gate_bias, e, M, N, SHARES), ACTIVATION) * up
        tl.store(g + e, value, mask=e < M * N)


@triton.jit
def _add_shares(sums, bias, e, M, N, SHARES: tl.constexpr):
    total = tl.load(sums + e, mask=e < M * N, other=0, cache_modifier=".cg")
    for share in tl.static_range(1, SHARES):
        total += tl.load(sums + share * M * N + e, mask=e < M * N, other=0, cache_modifier=".cg")
    if bias is not None:
        total += tl.load(bias + e % N, mask=e < M * N, other=0).to(tl.float32)
    return total


@triton.jit
def keeps(value, r, threshold, norms, R, PER_ROW: tl.constexpr):
    """The mask of the package: keep unless |h|·norms < threshold, so that NaN is kept."""
    score = tl.abs(value)
    if norms is not None:
        score *= tl.load(norms + r, mask=r < R, other=0)
    if PER_ROW:
        return (score < tl.load(threshold + r, mask=r < R, other=0)) == 0
    return (score < tl.load(threshold)) == 0


@triton.jit
def _stream(pointers, mask):
    """A weight is read once: let it leave the cache first."""
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def dot(a, b, total):
    """total + a b, where a product of two elements is exact in float32 (it is, below 32 bits)."""
    # the interpreter has no products of bfloat16, and float32 would be rounded to TF32 unless told not to
    if INTERPRETED or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def dot_exact(z, w, total):
    """total + z w for a float32 z. A 16-bit w fits TF32 as it is; z is taken apart into terms that do."""
    if w.dtype == tl.float32:
        return tl.dot(z, w, total, input_precision="ieee")
    return tl.dot(z, w.to(tl.float32), total, input_precision="tf32x3")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """A float32 value in `dtype`, rounded to nearest even."""
    # the interpreter cuts off what bfloat16 has no room for: round first what it will cut (NaN has no next)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return value / (1 + tl.exp(-value))
    if ACTIVATION == "gelu":
        return 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        return value / (1 + tl.exp(-2 * inner))
    kept = tl.where(value < 0, 0, value)  # NaN stays
    return kept if ACTIVATION == "relu" else kept * kept
